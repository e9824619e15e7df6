"""What a model answers to held-out questions, in ranked options or its own words; asked once."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
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


@dataclass(frozen=True, slots=True)
class Respondent:
    """A model that is asked, loaded at the first question that nobody has asked it yet.

    Attributes:
        name: of the arm, for progress and prices.
        path: of what was tuned; None for the untouched base.
        load: returns the model; the same one at every call.
        within: what stands for the model that the arm was plugged into, where `load` gives that;
            "" for the arm as it was trained.
    """

    name: str
    path: Path | None
    load: Load
    within: str = ""

    @classmethod
    def arm(cls, ground: Ground, name: str, path: Path | None) -> "Respondent":
        """Return an arm as it was trained.

        Args:
            ground: of the run.
            name: of the arm.
            path: of what was tuned; None for the untouched base.
        """

        @cache
        def load() -> tuple[Base, nn.Module]:
            base = ground.base()
            return base, base.model if path is None else load_tuned(base, path)

        return cls(name, path, load)


def rank_options(ground: Ground, model: Respondent, questions: Questions) -> dict[str, Evaluation]:
    """Return how a model ranks the options of held-out examples, by task.

    Args:
        ground: of the run.
        model: to ask.
        questions: examples by task.
    """
    found: dict[str, Evaluation] = {}
    for task, examples in questions.items():
        asked = list(examples)[: ground.recipe.evaluate.limit]
        fingerprint = digest(_facts(ground, model, asked))
        folder = ground.place("evaluation", f"evaluation/{model.name}-{task}", fingerprint)
        with ground.making(folder):
            found[task] = _ranked(ground, model, task, asked, folder, fingerprint)
    return found


def _ranked(
    ground: Ground,
    model: Respondent,
    task: str,
    asked: list[Example],
    folder: Path,
    fingerprint: str,
) -> Evaluation:
    step = f"evaluate {model.name}"
    if ground.is_done(folder, "evaluation", fingerprint):
        ground.recall(step, folder)
        opened = open_dir(folder, kind="evaluation")
        left_out: list[str] = opened.read_json("left_out.json")
        return Evaluation(opened.read_table("answers.parquet"), tuple(left_out))
    base, loaded = model.load()
    n = sum(max(1, len(e.options)) for e in asked)
    with (
        ground.charge(step, folder),
        ground.progress.phase(f"evaluate {model.name} on {task}", n, "answers") as advance,
    ):
        answers = evaluate(loaded, asked, base.tokenizer, advance=advance, **_how(ground, base))
        with staged(folder, kind="evaluation", meta={"fingerprint": fingerprint}) as stage:
            stage.write_table("answers.parquet", answers.table)
            stage.write_json("left_out.json", list(answers.left_out))
    kill_point(KillPoint.EVALUATE_DONE)
    return answers


def write_answers(ground: Ground, model: Respondent, questions: Questions) -> dict[str, Generation]:
    """Return what a model writes to held-out examples with options, by task.

    Args:
        ground: of the run.
        model: to ask.
        questions: examples by task; a task without options is left out.
    """
    found: dict[str, Generation] = {}
    for task, examples in questions.items():
        asked = [e for e in examples if e.options][: ground.recipe.evaluate.limit]
        if not asked:
            continue
        fingerprint = digest({**_facts(ground, model, asked), "form": "generated"})
        folder = ground.place("generation", f"generation/{model.name}-{task}", fingerprint)
        with ground.making(folder):
            found[task] = _written(ground, model, task, asked, folder, fingerprint)
    return found


def _written(
    ground: Ground,
    model: Respondent,
    task: str,
    asked: list[Example],
    folder: Path,
    fingerprint: str,
) -> Generation:
    step = f"generate {model.name}"
    if ground.is_done(folder, "generation", fingerprint):
        ground.recall(step, folder)
        opened = open_dir(folder, kind="generation")
        table, facts = opened.read_table("answers.parquet"), opened.read_json("facts.json")
        return Generation(table, tuple(facts["left_out"]), facts["n_truncated"])
    base, loaded = model.load()
    with (
        ground.charge(step, folder),
        ground.progress.phase(f"{model.name} writes on {task}", len(asked), "answers") as advance,
    ):
        written = generate_answers(
            loaded, asked, base.tokenizer, advance=advance, **_how(ground, base)
        )
        with staged(folder, kind="generation", meta={"fingerprint": fingerprint}) as stage:
            stage.write_table("answers.parquet", written.table)
            left_out = list(written.left_out)
            stage.write_json(
                "facts.json", {"left_out": left_out, "n_truncated": written.n_truncated}
            )
    kill_point(KillPoint.GENERATE_DONE)
    return written


def read_text(ground: Ground, model: Respondent) -> GenericLoss:
    """Return what a model expects of the recipe's plain text.

    Args:
        ground: of the run.
        model: to ask.
    """
    texts = ground.texts[: ground.recipe.evaluate.limit]
    content = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    fingerprint = digest({**_facts(ground, model, ()), "texts": content})
    folder = ground.place("reading", f"reading/{model.name}", fingerprint)
    with ground.making(folder):
        return _read(ground, model, texts, folder, fingerprint)


def _read(
    ground: Ground, model: Respondent, texts: list[str], folder: Path, fingerprint: str
) -> GenericLoss:
    step = f"read {model.name}"
    if ground.is_done(folder, "reading", fingerprint):
        ground.recall(step, folder)
        facts = open_dir(folder, kind="reading").read_json("loss.json")
        return GenericLoss(*(tuple(facts[key]) for key in ("ids", "nats", "n_tokens")))
    base, loaded = model.load()
    how = _how(ground, base)
    window = how.pop("max_length")
    with (
        ground.charge(step, folder),
        ground.progress.phase(f"{model.name} reads plain text", None, "windows") as advance,
    ):
        found = generic_loss(loaded, texts, base.tokenizer, window=window, advance=advance, **how)
        with staged(folder, kind="reading", meta={"fingerprint": fingerprint}) as stage:
            stage.write_json("loss.json", asdict(found))
    kill_point(KillPoint.READ_DONE)
    return found


def _how(ground: Ground, base: Base) -> dict[str, Any]:
    return {
        "max_length": ground.recipe.data.max_length,
        "pad_id": base.pad_id,
        "device": base.device.type,
        "precision": base.precision,
        "token_budget": ground.recipe.evaluate.token_budget,
    }


def _facts(ground: Ground, model: Respondent, asked: Sequence[Example]) -> dict[str, Any]:
    """Return what answers depend on."""
    recipe, within = ground.recipe, model.within
    device = choose_device(recipe.model.device)
    return {
        "model": _content(ground, model.path),
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
