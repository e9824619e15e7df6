"""How many weights train: one number, in the four forms that papers and users give it in."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

from torch import nn

from selectune.errors import ConfigError, SelectionError
from selectune.weights.base import base_weights
from selectune.weights.eligible import EligibleWeight, fits

FORMS = ("density", "percent_of_model", "lora_rank", "count")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What budgets are measured by.

    Attributes:
        eligible: weights that may be chosen from.
        model: weights of the whole base, tied ones once.
        per_rank: trainable numbers of a LoRA of rank 1 over the named projections.
    """

    eligible: int
    model: int
    per_rank: int


def sizes_of(
    model: nn.Module,
    eligible: Mapping[str, EligibleWeight],
    lora_modules: list[str] | None = None,
) -> Sizes:
    """Measure a model.

    Args:
        model: the base, bare or with adapters around it.
        eligible: from `eligible_weights`.
        lora_modules: patterns of the projections that the LoRA in question adapts; None for all
            linear maps that are eligible.

    Raises:
        SelectionError: a pattern fits no linear map that is eligible.
    """
    linear = {name: w for name, w in eligible.items() if w.is_linear and w.layer is not None}
    for pattern in lora_modules or ():
        if not any(fits(pattern, name) for name in linear):
            raise SelectionError(
                f'"{pattern}" fits no linear map among the eligible weights',
                where="lora_modules",
                why="a rank is counted over the projections that the LoRA would adapt",
                do="name projections such as q_proj, or leave lora_modules out",
            )
    counted = [
        w.parameter
        for name, w in linear.items()
        if lora_modules is None or any(fits(pattern, name) for pattern in lora_modules)
    ]
    return Sizes(
        eligible=sum(w.parameter.numel() for w in eligible.values()),
        model=sum(p.numel() for p in base_weights(model).values()),
        per_rank=sum(sum(p.shape) for p in counted),
    )


def exact(share: int | float) -> Fraction:
    """Return the decimal number that a share was written as: 0.29 of 100 is 29, not a bit less."""
    return Fraction(repr(float(share)))


def count_of(budget: Mapping[str, int | float], sizes: Sizes) -> int:
    """Return how many weights a budget is.

    Args:
        budget: one form and its value: `density` of the eligible weights; `percent_of_model`, the
            papers' number, k / (all base weights + k) in percent; `lora_rank`, as many as a LoRA
            of that rank trains; `count`.
        sizes: of the model.

    Raises:
        ConfigError: there is not exactly one form.
        SelectionError: it is no weight at all, or more than are eligible.
    """
    if len(budget) != 1:
        raise ConfigError(
            f"{len(budget)} budgets were given: {', '.join(budget) or 'none'}",
            where="budget",
            why=f"exactly one of {', '.join(FORMS)} says how many weights train",
            do="keep one of them",
        )
    ((form, value),) = budget.items()
    match form:
        case "density":
            count = floor(exact(value) * sizes.eligible)
        case "percent_of_model":
            share = exact(value) / 100
            count = floor(share * sizes.model / (1 - share))
        case "lora_rank":
            count = int(value) * sizes.per_rank
        case _:
            count = int(value)
    if not 1 <= count <= sizes.eligible:
        raise SelectionError(
            f"{form}={value:g} asks for {count:,} weights",
            where=form,
            why=f"{sizes.eligible:,} weights are eligible"
            + (", and no linear map is among them" if not sizes.per_rank else ""),
            do="give a budget of at least one weight and at most all of them",
        )
    return count


def every_form(count: int, sizes: Sizes) -> dict[str, Any]:
    """Return a number of weights in all forms; the rank is None where nothing could be adapted."""
    return {
        "count": count,
        "density": count / sizes.eligible,
        "percent_of_model": 100 * count / (sizes.model + count),
        "lora_rank": count / sizes.per_rank if sizes.per_rank else None,
    }
