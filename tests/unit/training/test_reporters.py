"""What a training method tells the places that a trainer reports to."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from selectune import GAST, IST
from selectune.training.reporters import numbers
from user_training import TRAINERS, Run

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


class Recorder(TrainerCallback):
    """A service that a trainer reports to."""

    heard: ClassVar[list[tuple[int, dict[str, Any]]]] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Keep what is reported."""
        assert logs is not None
        Recorder.heard.append((state.global_step, logs))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> str:
    Recorder.heard = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    return "recorder"


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_step_is_reported_when_the_trainer_reports_it(
    tmp_path: Path, kind: str, service: str
) -> None:
    method = GAST(sampler=IST(layers=2, interval=2))
    run = Run(tmp_path, kind, method, report_to=service, logging_steps=2, max_steps=4).train()
    ours = {step: logs for step, logs in Recorder.heard if "selectune/active_layers" in logs}
    assert list(ours) == [2, 4]
    facts = dict(run.records)
    for step, logs in ours.items():
        active = facts[step]["active"]
        assert logs["selectune/active_layers"] == 2
        picked = {key for key in logs if key.startswith("selectune/picked/")}
        assert picked == {f"selectune/picked/layer_{k}" for k in active}
        tokens = {k: logs[f"selectune/tokens/layer_{k}"] for k in active}
        assert tokens == {k: facts[step]["tokens"][k] for k in active}
    # The trainer's own numbers are told once, by its own reporter.
    assert sum("learning_rate" in logs for _, logs in Recorder.heard) == 2


def test_nothing_is_made_where_a_trainer_reports_nowhere(tmp_path: Path, service: str) -> None:
    Run(tmp_path, "transformers", GAST(), logging_steps=1, max_steps=1).train()
    assert Recorder.heard == []


def test_numbers_name_layers_by_their_index_in_the_model() -> None:
    facts = {
        "active": [4],
        "importance": [0.5, 0.25],
        "tokens": [None, 12],
        "picks": {"4": "0110"},
    }
    assert numbers(facts, [1, 4]) == {
        "selectune/active_layers": 1,
        "selectune/importance/layer_1": 0.5,
        "selectune/importance/layer_4": 0.25,
        "selectune/tokens/layer_4": 12,
        "selectune/picked/layer_4": 0.5,
    }


def test_a_reselection_is_told_as_a_share() -> None:
    facts = {"reselected": {"share": 0.2, "entries": 5, "of": 50}}
    assert numbers(facts, []) == {"selectune/reselected_share": 0.1}
