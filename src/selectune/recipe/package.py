"""A recipe whose base is an emulator: what it trains is limited to what its owner takes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from selectune.adapters.add import LORA_MODULES
from selectune.errors import ConfigError
from selectune.models import adapter_layers, model_is_package
from selectune.offsite.loading import manifest_of
from selectune.offsite.loading import outline as outline_of
from selectune.offsite.manifests import Form, Terms
from selectune.pipeline.equip import scorer_of
from selectune.recipe import AdapterSection, Recipe, TuneChoice, TuneSection, WeightsSection
from selectune.weights.eligible import eligible_weights

_Training = TypeVar("_Training", TuneSection, TuneChoice)
_KINDS: dict[str, Form] = {"full": "full", "lora": "lora"}


def layers_of(recipe: Recipe) -> list[int] | None:
    """Return the layers that a recipe's base lets train; None where the base is no package."""
    base = recipe.model.base
    return list(adapter_layers(base)) if model_is_package(base) else None


def fitted(recipe: Recipe) -> Recipe:
    """Return the recipe with what trains limited to the adapter layers of its package.

    Gradients are taken with the section `adapter`, LoRA where nothing else is asked for; what is
    tuned, where the recipe names neither adapter nor weights, is the adapter layers themselves.
    A recipe with another base comes back as it is.

    Raises:
        ConfigError: it asks for another layer, or for what cannot be plugged in.
    """
    base = recipe.model.base
    if not model_is_package(base):
        return recipe
    manifest = manifest_of(base)
    return limited(
        recipe, Limits(manifest.adapter_layers, manifest.terms, lambda: outline_of(base))
    )


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """What an emulator's owner lets train, and takes back.

    Attributes:
        layers: that train, as the model counts them.
        terms: of the owner.
        outline: returns the model as shapes only.
        who: what an error calls the emulator.
    """

    layers: Sequence[int]
    terms: Terms
    outline: Callable[[], nn.Module]
    who: str = "model.base is an emulator"


def limited(recipe: Recipe, limits: Limits) -> Recipe:
    """Return the recipe with what trains limited to what an emulator's owner takes back.

    Args:
        recipe: with the emulator as its base, or with the model that it will be made of.
        limits: of the emulator.

    Raises:
        ConfigError: as `fitted`.
    """
    package = _Package(limits)
    tune, matrix = recipe.tune, recipe.matrix
    is_silent = tune.adapter is None and tune.weights is None
    if "adapter" not in recipe.model_fields_set and is_silent and package.takes("full"):
        tune = tune.model_copy(update={"adapter": AdapterSection(kind="full")})
    if matrix is not None:
        rows = [
            row
            if isinstance(row, str) or row.tune is None
            else row.model_copy(
                update={"tune": package.training(row.tune, f"matrix.methods[{k}].tune")}
            )
            for k, row in enumerate(matrix.methods)
        ]
        matrix = matrix.model_copy(update={"methods": rows})
    changes = {
        "adapter": package.adapter(recipe.adapter, "adapter"),
        "tune": package.training(tune, "tune"),
        "matrix": matrix,
    }
    return recipe.model_copy(update=changes)


class _Package:
    """What one package lets a recipe train."""

    def __init__(self, limits: Limits) -> None:
        self._terms, self._outline, self._who = limits.terms, limits.outline, limits.who
        self._layers = list(limits.layers)

    def takes(self, form: Form) -> bool:
        """Return whether the package's owner takes this form back."""
        return form in self._terms.forms

    def training(self, section: _Training, where: str) -> _Training:
        """Return a section that says how something is trained, limited to the package's layers."""
        changes: dict[str, Any] = {}
        if section.adapter is not None:
            changes["adapter"] = self.adapter(section.adapter, f"{where}.adapter")
        if section.weights is not None:
            changes["weights"] = self._weights(section.weights, f"{where}.weights")
            if section.adapter is not None:
                raise self._unplugged(
                    "single weights and an adapter together", f"{where}.adapter", "remove one"
                )
        return section.model_copy(update=changes)

    def adapter(self, section: AdapterSection, where: str) -> AdapterSection:
        """Return an adapter section, limited likewise."""
        form = _KINDS.get(section.kind)
        if form is None or not self.takes(form):
            raise self._unplugged(
                section.kind, f"{where}.kind", f"use kind {' or '.join(self._terms.forms)}"
            )
        asked = self._layers if section.layers is None else section.layers
        strange = [index for index in asked if index not in self._layers]
        if strange:
            raise self._frozen(f"layer {strange[0]}", f"{where}.layers")
        if form == "lora":
            self._refuse_factors(section, where)
        return section.model_copy(update={"layers": list(asked)})

    def _refuse_factors(self, section: AdapterSection, where: str) -> None:
        most, allowed = self._terms.max_rank, self._terms.modules
        if most is not None and section.rank > most:
            raise self._unplugged(f"rank {section.rank}", f"{where}.rank", f"use rank {most}")
        modules = section.modules or LORA_MODULES
        if allowed is not None and not (isinstance(modules, list) and set(modules) <= set(allowed)):
            raise self._unplugged(
                f"LoRA in {modules if isinstance(modules, str) else ', '.join(modules)}",
                f"{where}.modules",
                f"use modules {list(allowed)}, or some of them",
            )

    def _weights(self, section: WeightsSection, where: str) -> WeightsSection:
        """Return the section with the name of every eligible weight in the layers that train."""
        if not self.takes("full"):
            raise self._unplugged("single weights", where, "train LoRA factors")
        asked = scorer_of(section, seed=0).eligible
        found = eligible_weights(self._outline(), asked)
        names = [name for name, weight in found.items() if weight.layer in self._layers]
        strange = [w for w in found.values() if w.layer not in self._layers]
        if strange and (isinstance(asked, list) or not names):
            raise self._frozen(strange[0].name, f"{where}.options.eligible")
        return section.model_copy(update={"options": {**section.options, "eligible": names}})

    def _frozen(self, what: str, where: str) -> ConfigError:
        return ConfigError(
            f"{what} does not train",
            where=where,
            why=f"{self._who} whose adapter is layers {self._layers}; the others stand in for what "
            "its owner keeps",
            do=f"use these layers, or some of them; without {where.rpartition('.')[-1]}, all",
        )

    def _unplugged(self, what: str, where: str, do: str) -> ConfigError:
        return ConfigError(
            f"{what} cannot be plugged into the model",
            where=where,
            why=f"{self._who}, and its owner takes back "
            + " or ".join("whole layers" if f == "full" else "LoRA" for f in self._terms.forms),
            do=do,
        )
