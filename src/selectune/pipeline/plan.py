"""The dry run: what would train, on what, and what it would cost, by cause. Nothing is written.

Memory is counted from shapes; time from one short measured matrix product and the number of
multiplications that each step needs. LIMITATIONS.md states how far both were off when measured.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectune.data import preview
from selectune.gradients.products import WAITING_BYTES
from selectune.gradients.view import View
from selectune.methods.evidence import ReadsCheckpoints
from selectune.methods.rules import Budget
from selectune.models import (
    blocks,
    choose_device,
    choose_precision,
    load_config,
    quantization_of,
)
from selectune.pipeline import foresee
from selectune.pipeline.equip import adapter_of, scorer_of
from selectune.pipeline.foresee import Outline, outline, refuse_unworkable
from selectune.pipeline.ground import Ground
from selectune.pipeline.outcome import Outcome
from selectune.pipeline.prices import (
    Prices,
    choosing_seconds,
    forward_share,
    n_answers,
    pass_price,
    training_seconds,
)
from selectune.pipeline.reselection import n_rescored
from selectune.pipeline.warmup import epochs_run, n_checkpoints
from selectune.recipe import ModelSection, Recipe, TuneSection
from selectune.recipe.methods import FULL, PLAIN
from selectune.registry import Need, get

_LIBRARIES_BYTES = 650 << 20  # resident after importing torch, transformers, peft and datasets
_SAVED_PER_HIDDEN = 16  # activations kept for backward, per token and block, in hidden sizes
_SAVED_PER_INNER = 5  # the same, in MLP sizes


def make_plan(ground: Ground) -> Outcome:
    """Return what a run would do; weights are not read, only their shapes.

    The facts are data, trainable parameters, memory and seconds by cause; the text says the same,
    with three examples and their loss mask.

    Raises:
        SelectuneError: the training method cannot work with this model or these options.
    """
    recipe = ground.recipe
    device = choose_device(recipe.model.device)
    found, scored = outline(ground, recipe.tune), outline(ground)
    refuse_unworkable(ground, [recipe.tune])
    trained, n_base = found.trained, found.n_base
    n_trained, n_scored = sum(trained.values()), sum(scored.trained.values())
    pool = ground.tokens.pool
    budget = Budget.of(recipe.select.budget, len(pool), int(pool.lengths.sum()))
    n_chosen = budget.examples or round((budget.tokens or 0) / max(1.0, float(pool.lengths.mean())))
    asked = asked_by(recipe, recipe.score.method, recipe.score.options)
    memory = training_bytes(ground, recipe.tune, found) | view_bytes(ground, asked, n_scored)
    seconds = _seconds(ground, found, n_chosen, asked, scored)
    facts = {
        "device": str(device),
        "precision": choose_precision(recipe.model.dtype, device),
        "pool": {
            "rows": len(ground.prepared.rows),
            "candidates": len(pool),
            "tokens": int(pool.lengths.sum()),
            "target_tokens": int(pool.n_targets.sum()),
            "truncated": pool.n_truncated,
            "dropped": len(ground.dropped),
        },
        "targets": {task: len(t) for task, t in ground.tokens.targets.items()},
        "heldout": {task: len(e) for task, e in ground.prepared.heldout.items()},
        "budget": n_chosen,
        "trainable": {"parameters": n_trained, "tensors": len(trained), "of": n_base},
        "method": foresee.facts(recipe.tune),
        "memory_bytes": memory,
        "disk_bytes": _disk(ground, n_scored, n_trained, asked),
        "pool_epochs": _pool_epochs(ground, asked, n_chosen),
        "seconds": seconds,
    }
    return Outcome(facts, _lines(ground, facts, trained, foresee.told(ground, found.model)))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a scorer asks for.

    Attributes:
        needs: what it reads.
        n_passes: gradient passes over the pool.
        view: how pool gradients are looked at.
    """

    needs: frozenset[Need]
    n_passes: int
    view: View

    @property
    def is_of_gradients(self) -> bool:
        """Whether it takes gradients of the pool."""
        return self.n_passes > 0

    @property
    def passes(self) -> str:
        """What its passes are called."""
        return f"gradients at {self.n_passes} checkpoints" if self.n_passes > 1 else "gradients"


def asked_by(recipe: Recipe, method: str, options: Mapping[str, Any]) -> Asked:
    """Return what a scorer of a recipe asks for.

    Args:
        recipe: of the run.
        method: name of the scorer.
        options: its options, as the recipe gives them.
    """
    entry = get("data_scorer", method)
    if "checkpoints" not in entry.needs:
        return Asked(entry.needs, int("gradients" in entry.needs), View())
    reading: ReadsCheckpoints = entry.parse(dict(options))
    return Asked(entry.needs, n_checkpoints(recipe, reading), reading.view)


def _passes(ground: Ground, asked: Asked) -> dict[str, float]:
    """Return how often the pool is passed over before anything is chosen, by cause."""
    recipe = ground.recipe
    found: dict[str, float] = {}
    if asked.is_of_gradients and recipe.model.adapter is None:
        found["warm-up"] = recipe.warmup.fraction * epochs_run(ground)
    if asked.is_of_gradients:
        found[asked.passes] = float(asked.n_passes)
    if "losses" in asked.needs:
        found["base losses"] = 1.0
    if "hidden_states" in asked.needs:
        found["hidden states"] = 1.0
    return found


def _arms(ground: Ground, n_chosen: int) -> dict[str, int]:
    """Return how many examples each arm trains on."""
    whole = len(ground.tokens.pool)
    controls = ground.recipe.tune.controls
    return {"selected": n_chosen} | {c: whole if c == FULL else n_chosen for c in controls}


def _pool_epochs(ground: Ground, asked: Asked, n_chosen: int) -> dict[str, float]:
    """Return work in units of training once on the whole pool, by cause, as the report has it."""
    forward = forward_share(trains_weights=ground.recipe.adapter.kind == "full")
    scoring = {
        cause: n * (forward if cause in ("base losses", "hidden states") else 1.0)
        for cause, n in _passes(ground, asked).items()
    }
    whole, epochs = len(ground.tokens.pool), ground.recipe.tune.epochs
    return scoring | {
        f"tune {arm}": epochs * n / whole for arm, n in _arms(ground, n_chosen).items()
    }


def view_bytes(ground: Ground, asked: Asked, n_scored: int) -> dict[str, int]:
    """Return what the gradient passes of a scorer hold in memory beside a plain one, by cause.

    Args:
        ground: of the run.
        asked: by the scorer.
        n_scored: numbers that gradients are taken of.
    """
    found: dict[str, int] = {}
    if asked.view.adam != "none":
        found["moments of Adam"] = 8 * n_scored
    if asked.view.projection.startswith("rademacher"):
        all_of_them = 4 * n_scored * len(ground.tokens.pool)
        found["gradients that wait for their projection"] = min(WAITING_BYTES, all_of_them)
    return found


def bytes_of_linear(section: ModelSection, held: int) -> float:
    """Return what one weight of a linear map takes in memory.

    Args:
        section: whose base.
        held: what it takes where it is not quantised.
    """
    match quantization_of(section):
        case None:
            return float(held)
        case "4bit":
            # Half a byte, a byte per 64 for their scale, and 4 per 256 scales for that of these.
            return 0.5 + 1 / 64 + 4 / (64 * 256)
        case _:
            return 1.0


def training_bytes(ground: Ground, tuning: TuneSection, found: Outline) -> dict[str, int]:
    """Return what a training holds in memory at its peak, by cause.

    Args:
        ground: of the run.
        tuning: how it is trained.
        found: what is trained.
    """
    recipe = ground.recipe
    config: Any = load_config(ground.assets.model)
    precision = choose_precision(recipe.model.dtype, choose_device(recipe.model.device))
    size = 2 if precision == "bfloat16" else 4
    adapter = adapter_of(ground, tuning)
    is_full = adapter is not None and adapter.kind == "full"
    held = 4 if is_full or recipe.adapter.kind == "full" else size
    n_adapter = sum(found.trained.values()) - found.n_weights
    largest = max(found.eligible.values(), default=0)
    scorer = None if tuning.weights is None else scorer_of(tuning.weights, seed=0)
    lengths = ground.tokens.pool.lengths
    # The longest examples make up the widest batch of both passes.
    step = sorted(lengths.tolist())[-tuning.batch_size :]
    tokens = max(recipe.score.token_budget, len(step) * max(step))
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    per_token = _SAVED_PER_HIDDEN * hidden + _SAVED_PER_INNER * inner
    share = float(ground.tokens.pool.n_targets.sum() / max(1, lengths.sum()))
    memory = {
        "libraries": _LIBRARIES_BYTES,
        "base weights": held * (found.n_base - (n_adapter if is_full else 0))
        - round((held - bytes_of_linear(ground.assets.model, held)) * found.n_linear),
        "trainable weights, gradients, AdamW": 16 * (n_adapter + found.n_weights),
        "saved activations": size * len(blocks(found.model)) * per_token * tokens,
        "logits at target positions": round(10 * tokens * share * int(config.vocab_size)),
    }
    if found.n_weights:
        is_composed = tuning.weights is not None and tuning.weights.form == "compose"
        # What a weight had before is kept in place; beside it, the row of each entry's place is.
        memory["places and base values of single weights"] = (
            4 + (4 if is_composed else size)
        ) * found.n_weights
        memory["dense gradient of one matrix"] = size * largest
    if scorer is not None and scorer.entry.needs:
        memory["evidence on weights, until they are chosen"] = 4 * sum(found.eligible.values())
    return memory


def evidence_bytes(
    ground: Ground, needs: Collection[Need], n_scored: int, *, n_passes: int, n_warmups: int = 1
) -> dict[str, int]:
    """Return what scorers leave on disk before anything is chosen, by cause.

    Args:
        ground: of the run.
        needs: of all scorers together.
        n_scored: numbers that gradients are taken of.
        n_passes: gradient passes over the pool.
        n_warmups: trainings before them.
    """
    n_pool = len(ground.tokens.pool)
    n_targets = sum(len(t) for t in ground.tokens.targets.values())
    found = {
        # Of one pass at a time, however many there are.
        "target gradients, until a pass is done": 4 * n_targets * n_scored * (n_passes > 0),
        "store": 4 * n_pool * (n_targets + 8) * n_passes,
    }
    if "checkpoints" in needs and ground.recipe.model.adapter is None:
        found["checkpoints of the warm-up"] = 12 * n_scored * epochs_run(ground) * n_warmups
    if "hidden_states" in needs:
        found["cosines of hidden states"] = 8 * n_pool * n_targets
    return found


def _disk(ground: Ground, n_scored: int, n_trained: int, asked: Asked) -> dict[str, int]:
    recipe = ground.recipe
    arms = 1 + len(recipe.tune.controls)
    return evidence_bytes(ground, asked.needs, n_scored, n_passes=asked.n_passes) | {
        "adapters and checkpoints": arms * n_trained * (4 + 12 * recipe.tune.keep_checkpoints),
    }


def _seconds(
    ground: Ground, found: Outline, n_chosen: int, asked: Asked, scored: Outline
) -> dict[str, float]:
    recipe, pool, tuning = ground.recipe, ground.tokens.pool, ground.recipe.tune
    prices = Prices.measured(ground, found.n_base)
    mean = float(pool.lengths.mean())
    gradient = prices.gradient(trains_weights=recipe.adapter.kind == "full")
    price = {"base losses": prices.forward, "hidden states": prices.forward}
    if asked.is_of_gradients:
        price[asked.passes] = pass_price(ground, scored, prices)
    seconds = {
        cause: n * len(pool) * mean * price.get(cause, gradient)
        for cause, n in _passes(ground, asked).items()
    }
    if asked.view.projection.startswith("rademacher"):
        products = 2 * sum(scored.trained.values()) * int(asked.view.projection.split(":")[1])
        seconds["projections"] = asked.n_passes * len(pool) * products / prices.rate
    n_runs = _arms(ground, n_chosen)
    if choosing := choosing_seconds(ground, tuning, found, prices, n_chosen, mean):
        seconds["weights"] = len(n_runs) * choosing
    if tuning.tokens is not None:
        n_told = sum(n for arm, n in n_runs.items() if arm != PLAIN)
        seconds["token scores"] = len(ground.tasks) * n_told * mean * gradient
    for arm, n in n_runs.items():
        how = tuning.plainly() if arm == PLAIN else tuning
        seconds[f"tune {arm}"] = training_seconds(ground, how, found, prices, n * mean)
        method = recipe.score.method if arm == "selected" else arm
        if again := n_rescored(how, method, n, len(pool)):
            seconds[f"new selections for {arm}"] = again * mean * gradient
    limit = recipe.evaluate.limit
    answers = sum(n_answers(examples, limit) for examples in ground.prepared.heldout.values())
    seconds["evaluate"] = (len(n_runs) + 1) * answers * mean * prices.forward
    return {name: round(value, 1) for name, value in seconds.items()}


def _lines(
    ground: Ground, facts: Mapping[str, Any], trained: Mapping[str, int], method: Sequence[str]
) -> list[str]:
    pool, trainable = facts["pool"], facts["trainable"]
    share = trainable["parameters"] / trainable["of"]
    targets = ", ".join(f"{task} {n}" for task, n in facts["targets"].items())
    heldout = ", ".join(f"{task} {n}" for task, n in facts["heldout"].items()) or "none: no verdict"
    lines = [
        *ground.prepared.notes,
        f"candidates  {pool['candidates']} of {pool['rows']} rows, {pool['tokens']:,} tokens, "
        f"{pool['target_tokens']:,} of them in the loss; {pool['truncated']} cut off",
        f"targets     {targets}",
        f"held-out    {heldout}",
        f"budget      {facts['budget']} examples",
        f"pool epochs {_told(facts['pool_epochs'])}",
        f"trains      {trainable['parameters']:,} parameters in {trainable['tensors']} tensors, "
        f"{share:.2%} of {trainable['of']:,}, on {facts['device']} in {facts['precision']}",
        *(f"            {name}  {n:,}" for name, n in list(trained.items())[:3]),
        f"            and {len(trained) - 3} more" if len(trained) > 3 else "",
        *method,
        "",
        *cost_table("memory", facts["memory_bytes"], 1 << 20, "MB"),
        *cost_table("disk", facts["disk_bytes"], 1 << 20, "MB"),
        *cost_table("time", facts["seconds"], 60, "min"),
        "",
        "three examples; what counts in the loss stands in [brackets]:",
    ]
    examples = list(ground.tokens.pool)
    shown = (examples[0], examples[len(examples) // 2], examples[-1])
    return lines + [f"  {t.id}  {masked(preview(t, ground.tokenizer))}" for t in shown]


def _told(epochs: Mapping[str, float]) -> str:
    parts = ", ".join(f"{cause} {n:.3g}" for cause, n in epochs.items())
    return f"{sum(epochs.values()):.3g}: {parts}; training once on everything is 1"


def cost_table(title: str, parts: Mapping[str, int | float], unit: int, name: str) -> list[str]:
    """Return a sum and its parts as lines.

    Args:
        title: what it is.
        parts: by cause.
        unit: that many are one of `name`.
        name: of the unit.
    """
    rows = [f"{title:<8}{sum(parts.values()) / unit:>10,.1f} {name}"]
    rows += [f"        {value / unit:>10,.1f}    {cause}" for cause, value in parts.items()]
    return rows


def masked(pieces: Sequence[tuple[str, bool]]) -> str:
    """Return text on one line, with brackets around every run that counts in the loss."""
    out: list[str] = []
    inside = False
    for text, is_target in pieces:
        if is_target != inside:
            out.append("[" if is_target else "]")
            inside = is_target
        out.append(text.replace("\n", "\\n"))
    return "".join(out) + ("]" if inside else "")
