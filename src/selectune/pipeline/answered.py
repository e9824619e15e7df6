"""What an arm answers to held-out questions, in ranked options or its own words; asked once."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from selectune.adapters import load_tuned
from selectune.data import Example
from selectune.evaluation import Evaluation, Generation, evaluate, generate_answers
from selectune.evaluation.generic_text import GenericLoss, generic_loss
from selectune.files import KillPoint, kill_point, open_dir, staged
from selectune.models import Base, choose_device, choose_precision
from selectune.pipeline.ground import Ground, digest

Questions = Mapping[str, Sequence[Example]]  # by task
Load = Callable[[], tuple[Base, nn.Module]]


def evaluate_arm(
    ground: Ground,
    name: str,
    path: Path | None,
    questions: Questions,
    *,
    load: Load | None = None,
    within: str = "",
) -> dict[str, Evaluation]:
    """Return how an arm ranks the options of held-out examples, by task.

    Args:
        ground: of the run.
        name: of the arm, for progress and prices.
        path: of what was tuned; None for the untouched base.
        questions: examples by task.
        load: from `once`, where more than this is asked of the arm; None loads it for this alone.
        within: what stands for the model that the arm was plugged into, where `load` gives that;
            "" for the arm as it was trained.
    """
    section = ground.recipe.evaluate
    load = load or once(ground, path)
    found: dict[str, Evaluation] = {}
    for task, examples in questions.items():
        asked = list(examples)[: section.limit]
        fingerprint = digest(_facts(ground, path, asked, within))
        folder = ground.place("evaluation", f"evaluation/{name}-{task}", fingerprint)
        step = f"evaluate {name}"
        if ground.is_done(folder, "evaluation", fingerprint):
            ground.recall(step, folder)
            opened = open_dir(folder, kind="evaluation")
            left_out: list[str] = opened.read_json("left_out.json")
            found[task] = Evaluation(opened.read_table("answers.parquet"), tuple(left_out))
            continue
        base, model = load()
        n = sum(max(1, len(e.options)) for e in asked)
        with (
            ground.charge(step, folder),
            ground.progress.phase(f"evaluate {name} on {task}", n, "answers") as advance,
        ):
            answers = evaluate(model, asked, base.tokenizer, advance=advance, **_how(ground, base))
            with staged(folder, kind="evaluation", meta={"fingerprint": fingerprint}) as stage:
                stage.write_table("answers.parquet", answers.table)
                stage.write_json("left_out.json", list(answers.left_out))
        kill_point(KillPoint.EVALUATE_DONE)
        found[task] = answers
    return found


def generate_arm(
    ground: Ground,
    name: str,
    path: Path | None,
    questions: Questions,
    *,
    load: Load | None = None,
    within: str = "",
) -> dict[str, Generation]:
    """Return what an arm writes to held-out examples with options, by task.

    Args:
        ground: of the run.
        name: of the arm, for progress and prices.
        path: of what was tuned; None for the untouched base.
        questions: examples by task; a task without options is left out.
        load: from `once`, where more than this is asked of the arm; None loads it for this alone.
        within: what stands for the model that the arm was plugged into, where `load` gives that;
            "" for the arm as it was trained.
    """
    section = ground.recipe.evaluate
    load = load or once(ground, path)
    found: dict[str, Generation] = {}
    for task, examples in questions.items():
        asked = [e for e in examples if e.options][: section.limit]
        if not asked:
            continue
        fingerprint = digest({**_facts(ground, path, asked, within), "form": "generated"})
        folder = ground.place("generation", f"generation/{name}-{task}", fingerprint)
        step = f"generate {name}"
        if ground.is_done(folder, "generation", fingerprint):
            ground.recall(step, folder)
            opened = open_dir(folder, kind="generation")
            table, facts = opened.read_table("answers.parquet"), opened.read_json("facts.json")
            found[task] = Generation(table, tuple(facts["left_out"]), facts["n_truncated"])
            continue
        base, model = load()
        with (
            ground.charge(step, folder),
            ground.progress.phase(f"{name} writes on {task}", len(asked), "answers") as advance,
        ):
            written = generate_answers(
                model, asked, base.tokenizer, advance=advance, **_how(ground, base)
            )
            with staged(folder, kind="generation", meta={"fingerprint": fingerprint}) as stage:
                stage.write_table("answers.parquet", written.table)
                left_out = list(written.left_out)
                stage.write_json(
                    "facts.json", {"left_out": left_out, "n_truncated": written.n_truncated}
                )
        kill_point(KillPoint.GENERATE_DONE)
        found[task] = written
    return found


def read_arm(
    ground: Ground,
    name: str,
    path: Path | None,
    *,
    load: Load | None = None,
    within: str = "",
) -> GenericLoss:
    """Return what an arm expects of the recipe's plain text.

    Args:
        ground: of the run.
        name: of the arm, for progress and prices.
        path: of what was tuned; None for the untouched base.
        load: from `once`, where more than this is asked of the arm; None loads it for this alone.
        within: what stands for the model that the arm was plugged into, where `load` gives that;
            "" for the arm as it was trained.
    """
    texts = ground.texts[: ground.recipe.evaluate.limit]
    content = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    fingerprint = digest({**_facts(ground, path, (), within), "texts": content})
    folder = ground.place("reading", f"reading/{name}", fingerprint)
    step = f"read {name}"
    if ground.is_done(folder, "reading", fingerprint):
        ground.recall(step, folder)
        facts = open_dir(folder, kind="reading").read_json("loss.json")
        return GenericLoss(*(tuple(facts[key]) for key in ("ids", "nats", "n_tokens")))
    base, model = (load or once(ground, path))()
    how = _how(ground, base)
    window = how.pop("max_length")
    with (
        ground.charge(step, folder),
        ground.progress.phase(f"{name} reads plain text", None, "windows") as advance,
    ):
        found = generic_loss(model, texts, base.tokenizer, window=window, advance=advance, **how)
        with staged(folder, kind="reading", meta={"fingerprint": fingerprint}) as stage:
            stage.write_json("loss.json", asdict(found))
    kill_point(KillPoint.READ_DONE)
    return found


def once(ground: Ground, path: Path | None) -> Load:
    """Return a loader of the arm's model, which works at its first call only."""
    loaded: list[tuple[Base, nn.Module]] = []

    def load() -> tuple[Base, nn.Module]:
        if not loaded:
            base = ground.base()
            loaded.append((base, base.model if path is None else load_tuned(base, path)))
        return loaded[0]

    return load


def _how(ground: Ground, base: Base) -> dict[str, Any]:
    return {
        "max_length": ground.recipe.data.max_length,
        "pad_id": base.pad_id,
        "device": base.device.type,
        "precision": base.precision,
        "token_budget": ground.recipe.evaluate.token_budget,
    }


def _facts(
    ground: Ground, path: Path | None, asked: Sequence[Example], within: str
) -> dict[str, Any]:
    """Return what answers depend on."""
    recipe = ground.recipe
    device = choose_device(recipe.model.device)
    return {
        "model": _content(ground, path),
        "ids": [e.id for e in asked],
        "options": [list(e.options) for e in asked],
        "max_length": recipe.data.max_length,
        "tokenizer": ground.tokenizer_fingerprint,
        "device": device.type,
        "precision": choose_precision(recipe.model.dtype, device),
        "token_budget": recipe.evaluate.token_budget,
        **({"within": within} if within else {}),  # answers of older versions have no such key
    }


def _content(ground: Ground, path: Path | None) -> str:
    """Return what stands for a model's weights: the base's name, or the adapter's manifest."""
    if path is None:
        return f"base {ground.base_fingerprint}"
    identity = open_dir(path, kind="adapter").meta["identity"]
    return json.dumps(identity, sort_keys=True)
