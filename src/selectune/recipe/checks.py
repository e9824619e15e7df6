"""What each key of a recipe allows but the keys together do not."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from selectune.errors import ConfigError, nearest
from selectune.recipe import words
from selectune.recipe.file import Tree
from selectune.recipe.methods import BESIDE_QUANTISED, FULL, PLAIN, RANDOM
from selectune.recipe.sections import (
    ONLY_TASK,
    AdapterSection,
    TuneChoice,
    TuneSection,
    WarmupSection,
)

if TYPE_CHECKING:
    from selectune.recipe import Recipe

# What each kind reads of the section, beside `kind`.
_FACTORS = frozenset({"rank", "alpha", "dropout", "modules", "layers"})
_BOTTLENECK = frozenset({"width", "activation", "dropout", "modules"})
_READ_BY = {
    "lora": _FACTORS,
    "dora": _FACTORS,
    "series": _BOTTLENECK,
    "parallel": _BOTTLENECK,
    "prefix": frozenset({"virtual_tokens"}),
    "full": frozenset({"layers"}),
}
# What an emulator cannot be made of.
_NO_PLAIN_MODEL = {
    "adapter": "an emulator is made of a plain model, and gradients are taken of the emulator",
    "quantization": "quantised weights can be neither decomposed nor narrowed",
}


def contradictions(recipe: "Recipe", tree: Tree) -> list[ConfigError]:
    """Return what each key allows but the keys together do not."""
    found: list[ConfigError] = []

    def add(path: words.Path, what: str, why: str, do: str) -> None:
        found.append(ConfigError(what, where=tree.where(path), why=why, do=do))

    for path, adapter in _adapters(recipe):
        place = ".".join(map(str, path))
        for key, value in adapter.model_dump(exclude={"kind"}).items():
            is_read = key in _READ_BY[adapter.kind]
            if not is_read and value != AdapterSection.model_fields[key].default:
                add(
                    (*path, key),
                    f"{place}.{key} would not be used",
                    f"{place}.kind is {adapter.kind}, which has no {key}",
                    f"remove {place}.{key}, or change {place}.kind",
                )
    for path, section in _trainings(recipe):
        if section.weights and section.adapter and section.adapter.kind == "full":
            add(
                (*path, "adapter", "kind"),
                "all weights would train, and single weights beside them",
                "weights names single weights of the base, and adapter.kind full trains all",
                "remove one of the two",
            )
        budget = next((b for b in _budgets(recipe, path) if isinstance(b, str)), None)
        if section.reselect_every is not None and budget is not None:
            add(
                (*path, "reselect_every"),
                "a new selection would have another number of examples",
                f"the budget is {budget}, and one learning-rate schedule needs as many steps in "
                "each epoch",
                "give the budget as a share or a count, or remove reselect_every",
            )
        chosen = section.weights
        if chosen is None or chosen.form != "compose":
            continue
        for key, value, why in uncomposed(chosen.route, chosen.decay_to):
            add(
                (*path, "weights", key),
                f"weights.{key} {value} does not go with weights.form compose",
                why,
                f"remove {key}, or use form: in_place",
            )
    for path in _changing_weights(recipe):
        add(
            path,
            "single weights cannot be trained on changing selections",
            "which weights train is read off the selection, once",
            "remove reselect_every, or train an adapter instead of weights",
        )
    if recipe.model.quantization is not None:
        for path, adapter in _adapters(recipe):
            if adapter.kind not in BESIDE_QUANTISED:
                add(
                    (*path, "kind"),
                    f"{'.'.join(map(str, path))}.kind {adapter.kind} is not trained on quantised "
                    "weights",
                    f"model.quantization is {recipe.model.quantization}",
                    f"use kind {' or '.join(BESIDE_QUANTISED)}, or remove model.quantization",
                )
        for path, section in _trainings(recipe):
            if section.weights is not None:
                add(
                    (*path, "weights"),
                    "single weights of a quantised base are not scored",
                    f"model.quantization is {recipe.model.quantization}",
                    "remove model.quantization; in Python, a mask of the dense base trains beside "
                    'a quantised one: sparsify(..., form="compose", other_base=True)',
                )
    for path, warmup in _warmups(recipe):
        if recipe.model.adapter is not None and warmup != WarmupSection():
            add(
                path,
                "the warm-up would not be used",
                "model.adapter names the adapter at which gradients are taken",
                "remove the section warmup, or remove model.adapter",
            )
        if warmup.epochs > warmup.schedule_epochs:
            add(
                (*path, "epochs"),
                f"warmup.epochs is {warmup.epochs}, past the end of the schedule",
                f"warmup.schedule_epochs is {warmup.schedule_epochs}",
                "make warmup.schedule_epochs at least warmup.epochs",
            )
        if warmup.until == "overlap":
            if warmup.epochs == 0:
                add(
                    (*path, "until"),
                    "there is no warm-up to end early",
                    "warmup.epochs is 0, and until: overlap runs at most these",
                    "raise warmup.epochs to the most that you would wait for",
                )
            continue
        for key in ("overlap", "overlap_times", "overlap_every"):
            if getattr(warmup, key) != WarmupSection.model_fields[key].default:
                add(
                    (*path, key),
                    f"warmup.{key} would not be used",
                    "warmup.until is epochs",
                    f"write until: overlap, or remove {key}",
                )
    shorter = recipe.score.max_length
    if isinstance(shorter, int) and shorter > recipe.data.max_length:
        add(
            ("score", "max_length"),
            f"score.max_length is {shorter}, longer than any example",
            f"data.max_length is {recipe.data.max_length}, and the rest is cut off before",
            "lower score.max_length, or remove it",
        )
    for path, quotas in _quotas(recipe):
        for source, (least, most) in quotas.items():
            if not 0 <= least <= most <= 1:
                add(
                    (*path, source),
                    f'the quota of "{source}" cannot be [{least}, {most}]',
                    "a quota is [least, most], as shares of the selection: 0 <= least <= most <= 1",
                    f"for example {source}: [0.1, 0.5]",
                )
        if sum(least for least, _ in quotas.values()) > 1 + 1e-9:
            add(
                path,
                "the least shares of select.quotas sum to more than 1",
                "they are shares of one selection",
                "lower some of them",
            )
    is_plain = (
        recipe.tune.method == PLAIN
        and recipe.tune.tokens is None
        and recipe.tune.reselect_every is None
    )
    if PLAIN in recipe.tune.controls and is_plain:
        add(
            ("tune", "controls", recipe.tune.controls.index(PLAIN)),
            f'the control "{PLAIN}" would equal the selection',
            f"it is the selection trained without a method, and tune.method is {PLAIN}",
            f'remove "{PLAIN}", or name a tune.method or tune.tokens',
        )
    matrix = recipe.matrix
    if matrix is not None and len(set(matrix.seeds)) < len(matrix.seeds):
        add(
            ("matrix", "seeds"),
            "a seed of the matrix stands twice",
            "one model would count as two, and make intervals too narrow",
            "name every seed once",
        )
    if matrix is not None and matrix.transfer:
        if matrix.tune is not None and matrix.tune.choose == "all":
            add(
                ("matrix", "tune", "choose"),
                "one training for all tasks tells nothing about transfer",
                "matrix.transfer trains on each task by itself",
                "use matrix.tune.choose: task, or remove matrix.transfer",
            )
        if isinstance(recipe.data.target, str) or len(recipe.data.target) < 2:
            add(
                ("matrix", "transfer"),
                "there is one target task",
                "transfer is measured on the tasks that a model was not trained on",
                "write data.target as a mapping of names to files, two or more",
            )
        for path, _ in _quotas(recipe):
            add(
                path,
                "the quotas would not be used",
                "matrix.transfer takes every selection from one task's own examples",
                "remove the quotas, or remove matrix.transfer",
            )
    for i, row in enumerate(matrix.methods if matrix else ()):
        if not isinstance(row, str) and row.select is not None and row.method == FULL:
            add(
                ("matrix", "methods", i, "select"),
                f'the row "{row.name}" selects nothing',
                f"{FULL} is the whole pool",
                "remove select from the row",
            )
        if isinstance(row, str) or row.emulate is None:
            continue
        for key, why in _NO_PLAIN_MODEL.items():
            if getattr(recipe.model, key) is not None:
                add(
                    ("matrix", "methods", i, "emulate"),
                    f"no emulator can be made beside model.{key}",
                    why,
                    f"remove model.{key}, or remove emulate from the row",
                )
    target = recipe.data.target
    tasks = [ONLY_TASK] if isinstance(target, str) else list(target)
    alone = f'; a file alone is called "{ONLY_TASK}"' if isinstance(target, str) else ""
    tested = matrix.transfer if matrix and not isinstance(matrix.transfer, bool) else []
    named = [("targets", *pair) for pair in enumerate(matrix.targets if matrix else ())]
    for key, i, name in [*named, *(("transfer", *pair) for pair in enumerate(tested))]:
        if name not in tasks:
            add(
                ("matrix", key, i),
                f'"{name}" is no target of this recipe',
                f"matrix.{key} takes names that data.target gives{alone}",
                nearest(name, tasks),
            )
    return found


def uncomposed(route: str, decay_to: str | None) -> list[tuple[str, str, str]]:
    """Return what does not go with entries that act beside their matrices.

    Args:
        route: how gradients reach the entries.
        decay_to: what weight decay pulls to.

    Returns:
        For each of the two that does not: its name, its value, and why.
    """
    found: list[tuple[str, str, str]] = []
    if decay_to == "zero":
        why = "what trains is a difference from a matrix that is not read"
        found.append(("decay_to", decay_to, why))
    if route == "columns":
        why = "chosen channels are multiplied entry by entry there"
        found.append(("route", route, why))
    return found


def _quotas(recipe: "Recipe") -> list[tuple[words.Path, Mapping[str, tuple[float, float]]]]:
    """Return the quotas that are given, by their place."""
    found: list[tuple[words.Path, Mapping[str, tuple[float, float]]]] = []
    if recipe.select.quotas:
        found.append((("select", "quotas"), recipe.select.quotas))
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        if not isinstance(row, str) and row.select is not None and row.select.quotas:
            found.append((("matrix", "methods", i, "select", "quotas"), row.select.quotas))
    return found


def _budgets(recipe: "Recipe", training: words.Path) -> list[Any]:
    """Return the budgets of what is trained as a section says that stands at a place."""
    matrix = recipe.matrix
    if matrix is None:
        return [recipe.select.budget]
    rows = matrix.methods if training == ("tune",) else [matrix.methods[int(training[2])]]
    own = [None if isinstance(row, str) or not row.select else row.select.budget for row in rows]
    shared = matrix.budgets or [recipe.select.budget]
    return [b for one in own for b in (shared if one is None else [one])]


def _trainings(recipe: "Recipe") -> list[tuple[words.Path, TuneSection | TuneChoice]]:
    """Return every section that says how something is trained, by its place."""
    found: list[tuple[words.Path, TuneSection | TuneChoice]] = [(("tune",), recipe.tune)]
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        if not isinstance(row, str) and row.tune is not None:
            found.append((("matrix", "methods", i, "tune"), row.tune))
    return found


def _changing_weights(recipe: "Recipe") -> list[words.Path]:
    """Return what asks for single weights that would train on examples chosen anew.

    A row takes from `tune` what it does not say, and is looked at where it says one of the two.
    """
    whole = recipe.tune
    found: list[words.Path] = []
    if whole.reselect_every is not None and whole.weights is not None:
        found.append(("tune", "reselect_every"))
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        if isinstance(row, str) or row.tune is None or row.method in (RANDOM, FULL):
            continue
        own, path = row.tune, ("matrix", "methods", i, "tune")
        trains_alone = own.adapter is not None or own.weights is not None
        weights = own.weights if trains_alone else whole.weights
        if weights is None:
            continue
        if own.reselect_every is not None:
            found.append((*path, "reselect_every"))
        elif whole.reselect_every is not None and trains_alone:
            found.append((*path, "weights"))
    return found


def _warmups(recipe: "Recipe") -> list[tuple[words.Path, WarmupSection]]:
    found: list[tuple[words.Path, WarmupSection]] = [(("warmup",), recipe.warmup)]
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        if not isinstance(row, str) and row.warmup is not None:
            found.append((("matrix", "methods", i, "warmup"), row.warmup))
    return found


def _adapters(recipe: "Recipe") -> list[tuple[words.Path, AdapterSection]]:
    found: list[tuple[words.Path, AdapterSection]] = [(("adapter",), recipe.adapter)]
    for i, row in enumerate(recipe.matrix.methods if recipe.matrix else ()):
        if not isinstance(row, str) and row.adapter is not None:
            found.append((("matrix", "methods", i, "adapter"), row.adapter))
    for path, section in _trainings(recipe):
        if section.adapter is not None:
            found.append(((*path, "adapter"), section.adapter))
    return found
