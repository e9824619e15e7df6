"""A training method's facts in the places that a trainer reports to (`report_to`)."""

from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

_PER_LAYER = (
    "importance",
    "alignment_mean",
    "alignment_std",
    "max_z",
    "target_cosine",
    "tokens",
)


class Reporters:
    """Reporters of our own, made like the trainer's.

    The trainer's have written a step's numbers by the time that a callback hears of it, and nothing
    leads from a callback to them. Wandb, mlflow, trackio and their like go on in the run that is
    active; tensorboard gets an event file of its own.

    Args:
        args: of the trainer.
        state: at the start of the training.
        control: of the trainer.
    """

    def __init__(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        kinds = cast(
            "list[type[TrainerCallback]]", get_reporting_integration_callbacks(args.report_to)
        )
        self._reporters = [kind() for kind in kinds] if state.is_world_process_zero else []
        for reporter in self._reporters:
            reporter.on_train_begin(args, state, control)

    def tell(
        self,
        facts: dict[str, Any],
        layers: list[int],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Report one step.

        Args:
            facts: of the step.
            layers: index of the layer at each place of the facts' lists.
            args: of the trainer.
            state: at that step.
            control: of the trainer.
        """
        for reporter in self._reporters:
            cast("Any", reporter).on_log(args, state, control, logs=numbers(facts, layers))


def numbers(facts: dict[str, Any], layers: list[int]) -> dict[str, float]:
    """Return the numbers in a step's facts under flat names, such as selectune/tokens/layer_7.

    Args:
        facts: of the step.
        layers: index of the layer at each place of the facts' lists.
    """
    found: dict[str, float] = {}
    if "active" in facts:
        found["selectune/active_layers"] = float(len(facts["active"]))
    for key in _PER_LAYER:
        for index, value in zip(layers, facts.get(key) or (), strict=False):
            if value is not None:
                found[f"selectune/{key}/layer_{index}"] = float(value)
    if (exchange := facts.get("reselected")) is not None:
        found["selectune/reselected_share"] = exchange["entries"] / max(1, exchange["of"])
    for index, picks in facts.get("picks", {}).items():
        found[f"selectune/picked/layer_{index}"] = picks.count("1") / max(1, len(picks))
    return found
