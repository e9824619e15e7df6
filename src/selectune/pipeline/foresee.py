"""What a training method will do to a model, and whether it can, told before weights are loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from selectune.adapters import add_adapter
from selectune.errors import ConfigError
from selectune.methods.data_layer.gast import GAST
from selectune.models import choose_device, choose_precision, load_config, model_is_package
from selectune.offsite.loading import outline as package_outline
from selectune.pipeline.equip import adapter_of, scorer_of
from selectune.pipeline.ground import Ground
from selectune.recipe import ModelSection, TuneSection
from selectune.recipe.methods import PLAIN
from selectune.registry import get
from selectune.training.chosen import chosen_method, options_of
from selectune.training.layer_sampling import count_of as layers_of
from selectune.training.layers import trainable_layers
from selectune.training.method import Method, Scene
from selectune.training.picks import wanted
from selectune.training.sources import TokenSource
from selectune.training.sparse.refusals import composable
from selectune.weights.budget import count_of, sizes_of
from selectune.weights.eligible import eligible_weights


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A model that will be trained, as shapes only.

    Attributes:
        model: with its adapter; single weights that train are frozen in it.
        n_base: weights of the base.
        n_linear: those of its linear maps, which quantisation makes smaller.
        eligible: entries of every tensor that single weights may be chosen from, by name.
        n_weights: how many of them train.
    """

    model: nn.Module
    n_base: int
    n_linear: int = 0
    eligible: Mapping[str, int] = field(default_factory=dict[str, int])
    n_weights: int = 0

    @property
    def trained(self) -> dict[str, int]:
        """Numbers that train, by tensor; single weights by what they are chosen from."""
        found = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad}
        if self.n_weights:
            chosen_from = f"of {sum(self.eligible.values()):,} in {len(self.eligible)} matrices"
            found = {f"single weights, {chosen_from}": self.n_weights, **found}
        return found


def outline(ground: Ground, tuning: TuneSection | None = None) -> Outline:
    """Return what a run trains, as shapes only.

    Args:
        ground: of the run.
        tuning: how it is trained; None for the model that gradients are taken of.

    Raises:
        SelectionError: the recipe names a module, a layer or a weight that the model has not.
        CoverageError: single weights cannot train in the form that the recipe asks for.
        ConfigError: no such scorer of weights, or a wrong option.
    """
    recipe = ground.recipe
    adapter = recipe.adapter if tuning is None else adapter_of(ground, tuning)
    with torch.device("meta"):
        bare = _bare(ground.assets.model)
        n_base = sum(p.numel() for p in bare.parameters())
        head = cast("Any", bare).get_output_embeddings()
        linear = [m for m in bare.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
        n_linear = sum(m.weight.numel() for m in linear)
        eligible: dict[str, int] = {}
        n_weights = 0
        if tuning is not None and tuning.weights is not None:
            scorer = scorer_of(tuning.weights, seed=recipe.seed)
            found = scorer.narrow(eligible_weights(bare, scorer.eligible))
            if tuning.weights.form == "compose":
                composable(bare, found)
            eligible = {name: weight.parameter.numel() for name, weight in found.items()}
            n_weights = count_of(scorer.budget, sizes_of(bare, found, scorer.lora_modules))
        for p in bare.parameters():
            p.requires_grad_(False)
        model = bare if adapter is None else add_adapter(bare, adapter, seed=recipe.seed)
    return Outline(model, n_base, n_linear, eligible, n_weights)


def _bare(section: ModelSection) -> nn.Module:
    if model_is_package(section.base):
        return package_outline(section.base)
    return cast("nn.Module", AutoModelForCausalLM.from_config(load_config(section)))


def refuse_unworkable(ground: Ground, tunings: Sequence[TuneSection]) -> None:
    """Put every method to work on the model's shapes, and take it off again.

    Args:
        ground: of the run.
        tunings: what will be trained; equal methods are tried once.

    Raises:
        SelectuneError: a method cannot work with this model, these batches or these options.
    """
    tried: list[Method] = []
    for tuning in tunings:
        method = chosen_method(tuning)
        found = outline(ground, tuning)
        if method is None or method in tried:
            continue
        _refuse_optimizer(method, tuning)
        if isinstance(method, GAST):
            _refuse_batches(method, tuning)
        if tuning.weights is not None:
            continue  # which layers train is known when the weights are chosen
        tried.append(method)
        recipe, model = ground.recipe, found.model
        pool = TokenSource(list(ground.tokens.pool), pad_id=0)
        targets = [t for task in ground.tasks for t in ground.tokens.targets[task]]
        scene = Scene(
            model,
            seed=recipe.seed,
            precision=choose_precision(recipe.model.dtype, choose_device(recipe.model.device)),
            pool=pool,
            target=TokenSource(targets, pad_id=0) if targets else None,
            weighting="token",
        )
        try:
            method.start(scene).close()
        except (NotImplementedError, RuntimeError):
            # It looks at weights, and here are none. Its options have been checked by then.
            continue


def told(ground: Ground, model: nn.Module) -> list[str]:
    """Return what the recipe's training method will do, in lines for a person; none for plain.

    Args:
        ground: of the run.
        model: its outline.
    """
    tuning = ground.recipe.tune
    method = chosen_method(tuning)
    if method is None:
        return []
    entry = get("training_method", tuning.method)
    options = ", ".join(f"{key} {value}" for key, value in tuning.options.items())
    lines = [
        f"method      {tuning.method}: {entry.summary}",
        f"            {options or 'all options at their defaults'}",
    ]
    if tuning.weights is None:
        n_layers = len(trainable_layers(model))
        lines[-1] += f"; {n_layers} layers train"
        if (layers := options_of(method).get("layers")) is not None:
            lines[-1] += f", {layers_of(layers, n_layers)} at a time"
    if isinstance(method, GAST):
        n = tuning.batch_size
        who = "the model" if tuning.method == "greats" else "each layer"
        of = "the pool" if method.target == "pool" else "the target"
        every = "step" if method.refresh_every == 1 else f"{method.refresh_every} steps"
        kept = wanted(method.keep, n)
        lines.append(
            f"            {who} learns from {kept} of the {n} examples of a forward "
            f"pass; {method.target_batch} examples of {of} are looked at every {every}"
        )
    return lines


def extra_work(tuning: TuneSection) -> float:
    """Return a method's own passes as a share of plain training; a sampler's savings are not in."""
    method = chosen_method(tuning)
    if not isinstance(method, GAST) or "score" not in get("row_picker", method.pick).needs:
        return 0.0
    step = tuning.batch_size * tuning.accumulation
    second = 1.0 if method.form == "two_pass" else 0.0
    return method.target_batch / step / method.refresh_every + second


def facts(tuning: TuneSection) -> dict[str, Any] | None:
    """Return a method by name and options, None for plain training."""
    if tuning.method == PLAIN:
        return None
    return {"name": tuning.method, "options": dict(tuning.options)}


def _refuse_optimizer(method: Method, tuning: TuneSection) -> None:
    asked = tuning.optimizer
    if method.optimizer is not None and asked != TuneSection.model_fields["optimizer"].default:
        raise ConfigError(
            f"the optimizer {asked} would not be used",
            where="tune.optimizer",
            why=f"{tuning.method} works with {method.optimizer.__name__} alone",
            do="remove tune.optimizer, or choose another tune.method",
        )


def _refuse_batches(method: GAST, tuning: TuneSection) -> None:
    n, keep = tuning.batch_size, method.keep
    if method.form == "concat":
        raise ConfigError(
            "form=concat cannot be used in a recipe",
            where="tune.options.form",
            why="it takes the last rows of a batch for target examples, and a trainer adds none",
            do='use form "separate": the result is the same',
        )
    if keep == 1.0 and isinstance(keep, float):
        return
    if n == 1:
        raise ConfigError(
            "there is nothing to choose from in a batch of one example",
            where="tune.batch_size",
            why="examples are picked within a forward pass",
            do="raise tune.batch_size and lower tune.accumulation, or set keep to 1.0",
        )
    if wanted(method.keep, n) < 1:
        raise ConfigError(
            f"keep {keep} of {n} examples rounds to none",
            where="tune.options.keep",
            why=f"a forward pass has tune.batch_size = {n} examples",
            do=f"raise keep to {1 / n:.3g} or more, or raise tune.batch_size",
        )
    if wanted(method.keep, n) > n:
        raise ConfigError(
            f"keep {keep} is more than the {n} examples of a forward pass",
            where="tune.options.keep",
            why=f"tune.batch_size is {n}",
            do=f"use a number up to {n}, or a share such as 0.5",
        )
