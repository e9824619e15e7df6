"""What a scorer of single weights is asked for: how many, of which, competing where."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from selectune.errors import ConfigError
from selectune.registry import Entry, WeightNeed, entry_of
from selectune.weights.budget import FORMS
from selectune.weights.eligible import Eligible, EligibleWeight
from selectune.weights.statistics import Weighting

Scope = Literal["global", "per_layer", "per_tensor"]
Threshold = Literal["exact", "sampled"]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, slots=True, eq=False)
class TensorEvidence:
    """What is known of one tensor beside its weights; only what the scorer needs is there.

    Attributes:
        name: in the bare base.
        is_input_first: whether it is stored [in, out], and not [out, in].
        values: per need, in the shape of the weight.
    """

    name: str
    is_input_first: bool
    values: Mapping[WeightNeed, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerOptions:
    """The options that all scorers of weights have, and what each of them says about itself."""

    default_scope: ClassVar[Scope] = "global"
    default_density: ClassVar[float] = 0.01

    density: Annotated[
        Share | None, Field(description="share of the eligible weights that trains")
    ] = None
    percent_of_model: Annotated[
        Annotated[float, Field(gt=0, lt=100)] | None,
        Field(description="k / (all base weights + k), in percent: the number in papers"),
    ] = None
    lora_rank: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="as many weights as a LoRA of this rank trains"),
    ] = None
    count: Annotated[
        Annotated[int, Field(ge=1)] | None, Field(description="number of weights that train")
    ] = None
    lora_modules: Annotated[
        list[str] | None,
        Field(description="projections that lora_rank counts over; null: all eligible ones"),
    ] = None
    eligible: Annotated[
        Eligible,
        Field(description="matrices inside layers, all weights, or names such as q_proj"),
    ] = "layers"
    scope: Annotated[
        Scope | None, Field(description="where weights compete; null: as the method's paper")
    ] = None
    threshold: Annotated[
        Threshold, Field(description="exactly k weights, or about k from sampled scores")
    ] = "exact"
    sample: Annotated[int, Field(ge=1, description="scores in the sample")] = 1_000_000
    floor: Annotated[
        Share | None, Field(description="least share of every tensor, if scope is wider")
    ] = None
    ceiling: Annotated[
        Share | None, Field(description="largest share of every tensor, if scope is wider")
    ] = None
    examples: Annotated[
        int, Field(ge=1, description="examples that the evidence is taken from")
    ] = 1024
    weighting: Annotated[
        Weighting, Field(description="mean gradient over examples, or over target tokens")
    ] = "example"
    seed: Annotated[int, Field(ge=0, description="of every draw")] = 0

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: two budgets, or bounds that cannot be kept.
        """
        given = self._given()
        if len(given) > 1:
            raise ConfigError(
                f"{len(given)} budgets were given: {', '.join(given)}",
                where=type(self).__name__,
                why=f"exactly one of {', '.join(FORMS)} says how many weights train",
                do="keep one of them",
            )
        bounds = [k for k, v in (("floor", self.floor), ("ceiling", self.ceiling)) if v is not None]
        if bounds and self.scope_used == "per_tensor":
            raise ConfigError(
                f'{bounds[0]} has no meaning with scope="per_tensor"',
                where=type(self).__name__,
                why="every tensor has the same share already",
                do=f'leave {bounds[0]} out, or use scope="global"',
            )
        if bounds and self.threshold == "sampled":
            raise ConfigError(
                f'{bounds[0]} needs threshold="exact"',
                where=type(self).__name__,
                why="a sampled threshold does not know how many weights pass it",
                do=f'leave {bounds[0]} out, or use threshold="exact"',
            )

    def values(self, weight: Tensor, evidence: TensorEvidence) -> Tensor:
        """Return the score of every entry of one tensor; the highest train.

        Args:
            weight: fp32, on the CPU.
            evidence: what the scorer needs to know, alike.

        Returns:
            Scores of the shape of the weight, or with size 1 where whole rows or columns have one
            score and are chosen together; see `units`.
        """
        raise NotImplementedError

    def units(self, shape: tuple[int, ...], is_input_first: bool) -> tuple[int, ...]:
        """Return the shape of the scores of a tensor; by itself that of the tensor."""
        _ = is_input_first
        return shape

    def narrow(self, found: dict[str, EligibleWeight]) -> dict[str, EligibleWeight]:
        """Return those of the eligible weights that the method is for; by itself all."""
        return found

    def micro_batch_size(self) -> int:
        """Return how many examples one micro-batch has, where the evidence is of micro-batches."""
        return 1

    def tensor_count(self, share: Fraction, n: int) -> int:
        """Return how many of n units of a tensor a share is, where each tensor has its own."""
        return floor(share * n)

    @property
    def entry(self) -> Entry:
        """The scorer's place in the registry."""
        return entry_of("weight_scorer", type(self))

    @property
    def budget(self) -> dict[str, int | float]:
        """The one form of budget that was given, or the method's own density."""
        return self._given() or {"density": self.default_density}

    def but(self, **options: Any) -> "ScorerOptions":  # noqa: ANN401
        """Return the scorer with other options; a budget takes the place of the one it had.

        Raises:
            ConfigError: an option is out of range, or contradicts another.
        """
        if any(form in options for form in FORMS):
            options = {**dict.fromkeys(FORMS), **options}
        return replace(self, **options)

    @property
    def scope_used(self) -> Scope:
        """Where weights compete: as asked for, or as in the method's paper."""
        return self.scope or self.default_scope

    def _given(self) -> dict[str, int | float]:
        forms = {
            "density": self.density,
            "percent_of_model": self.percent_of_model,
            "lora_rank": self.lora_rank,
            "count": self.count,
        }
        return {form: value for form, value in forms.items() if value is not None}
