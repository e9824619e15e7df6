"""Put onto a base what a `tune` section trains: an adapter, single weights of the base, or both."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from selectune.adapters import add_adapter
from selectune.data.tokens import Tokens
from selectune.errors import CorruptFileError
from selectune.files import write_file
from selectune.methods.weights.random import random_matched
from selectune.models import Base
from selectune.pipeline.ground import Ground, digest
from selectune.recipe import AdapterSection, TuneSection, WeightsSection
from selectune.registry import get
from selectune.training.chosen import fingerprint_of
from selectune.training.sparse import sparsify
from selectune.weights.mask import KIND, WeightMask
from selectune.weights.plane import plane_of
from selectune.weights.scorer import WeightScorer


@dataclass(frozen=True, slots=True, eq=False)
class Equipped:
    """A base that is ready to train.

    Attributes:
        model: with what trains.
        mask: which single weights train; None where none do.
        plane: those among all weights by magnitude and gradient, as plain values, where gradients
            were looked at.
    """

    model: nn.Module
    mask: WeightMask | None
    plane: Mapping[str, Any] | None


# Trains all weights on the given examples and returns the model; for scorers that look at it.
FineTune = Callable[[], nn.Module]


def adapter_of(ground: Ground, options: TuneSection) -> AdapterSection | None:
    """Return the adapter that a `tune` section trains, None where single weights train alone."""
    if options.adapter is not None:
        return options.adapter
    return None if options.weights is not None else ground.recipe.adapter


def scorer_of(section: WeightsSection, *, seed: int) -> WeightScorer:
    """Return the scorer that a `weights` section names.

    Args:
        section: name, density and options.
        seed: of its draws, unless the options have one.

    Raises:
        ConfigError: no such scorer, or a wrong option.
    """
    entry = get("weight_scorer", section.method, where="tune.weights.method")
    options: dict[str, Any] = {"seed": seed, **section.options}
    if section.density is not None:
        options["density"] = section.density
    return entry.parse(options, where="tune.weights.options")


def equip(
    ground: Ground,
    base: Base,
    items: Sequence[Tokens],
    options: TuneSection,
    *,
    name: str,
    fine_tune: FineTune,
) -> Equipped:
    """Return the base made ready to train.

    Args:
        ground: of the run.
        base: a fresh one.
        items: the examples to train on, from which weights are scored too.
        options: of the training.
        name: of the arm.
        fine_tune: for scorers that look at a fine-tuned model.

    Raises:
        SelectuneError: the base has nothing of what is asked for.
    """
    mask, plane = None, None
    if options.weights is not None:
        mask, plane = _mask(ground, base, items, options, name, fine_tune)
        if options.weights.shuffled:
            mask, plane = random_matched(mask, ground.recipe.seed), None
    adapter = adapter_of(ground, options)
    model = base.model
    if adapter is not None:
        model = add_adapter(model, adapter, seed=ground.recipe.seed)
    if mask is not None and options.weights is not None:
        section = options.weights
        model = sparsify(
            model, mask, route=section.route, decay_to=section.decay_to, form=section.form
        )
    return Equipped(model, mask, plane)


def _mask(
    ground: Ground,
    base: Base,
    items: Sequence[Tokens],
    options: TuneSection,
    name: str,
    fine_tune: FineTune,
) -> tuple[WeightMask, dict[str, Any] | None]:
    assert options.weights is not None
    scorer = scorer_of(options.weights, seed=ground.recipe.seed)
    needs = scorer.entry.needs
    facts = {
        "base": base.fingerprint,
        "scorer": repr(scorer),
        "items": fingerprint_of(items) if needs else None,
        # What fine-tuning changes depends on how it is done.
        "tune": options.model_dump() if "drift" in needs else None,
    }
    fingerprint = digest(facts)
    path = ground.place("mask", f"mask/{name}", fingerprint)
    step = f"weights {name}"
    with ground.making(path):
        if ground.is_done(path, KIND, fingerprint):
            ground.recall(step, path)
            return WeightMask.load(path), _read_plane(path)
        n = min(scorer.examples, len(items)) if needs else 0
        with (
            ground.charge(step, path),
            ground.progress.phase(f"score weights for {name}", n, "examples") as advance,
        ):
            scores = scorer.score(
                base.model,
                items,
                tokenizer=base.tokenizer,
                token_budget=ground.recipe.score.token_budget,
                precision=base.precision,
                tuned=fine_tune() if "drift" in needs else None,
                advance=advance,
            )
            mask = scores.select()
            plane = None
            if needs:  # once training starts nobody can count this again
                plane = plane_of(scores, {name: mask}).to_json()
                write_file(_plane(path), json.dumps(plane).encode())
            mask.save(path, fingerprint=fingerprint)
        return mask, plane


def _plane(path: Path) -> Path:
    return path.with_name(path.name + ".plane.json")


def _read_plane(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(_plane(path).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptFileError(
            "a count of weights cannot be read", where=str(_plane(path))
        ) from error


def mask_digest(mask: WeightMask | None) -> str | None:
    """Return a hash of a mask's entries, None without one."""
    if mask is None:
        return None
    found = hashlib.sha256()
    for name, index in mask:
        found.update(f"{name}:{index.numel()}".encode())
        content: Any = index.numpy()
        found.update(content)
    return found.hexdigest()[:32]
