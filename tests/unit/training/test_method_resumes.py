"""Checkpoints of the trainers that hold the state of a training method."""

from pathlib import Path

import pytest

from selectune import GAST, GREATS
from selectune.errors import CorruptFileError, IncompatibleRunError
from selectune.training.method import Method
from selectune.training.method_callback import FACTS, TENSORS
from user_training import Run, assert_same_bits, count_hooks

# transformers 5.24 renamed `gradient_checkpointing`, which 5.23 and trl 1.16 know alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("transformers", GAST()),
        ("transformers", GAST(refresh_every=3)),
        ("trl", GAST(momentum=0.5, refresh_every=2)),
        ("transformers", GREATS()),
    ],
    ids=["fresh", "kept", "momentum", "greats"],
)
def test_resuming_equals_not_stopping(tmp_path: Path, kind: str, method: Method) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    unbroken = Run(tmp_path / "run", kind, method, **options).train()
    for step in (1, 2):  # within an epoch, and between two
        again = Run(tmp_path / "run", kind, method, **options)
        again.train(tmp_path / "run" / f"checkpoint-{step}")
        assert_same_bits(again, unbroken)


def test_a_checkpoint_elsewhere_is_named_in_the_arguments(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    method = GAST(refresh_every=4)
    first = Run(tmp_path / "first", "transformers", method, **options).train()
    start = tmp_path / "first" / "checkpoint-2"
    with pytest.raises(IncompatibleRunError, match="resume_from_checkpoint"):
        Run(tmp_path / "second", "transformers", method, **options).train(start)
    other = {**options, "seed": 5}
    Run(tmp_path / "second", "transformers", method, **other).train()
    with pytest.raises(IncompatibleRunError, match="another run's checkpoint"):
        Run(tmp_path / "second", "transformers", method, **options).train(start)
    named = {**options, "resume_from_checkpoint": str(start)}
    assert_same_bits(Run(tmp_path / "second", "transformers", method, **named).train(start), first)


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    kept = GAST(refresh_every=4)
    Run(tmp_path, "transformers", kept, **options).train()
    start = tmp_path / "checkpoint-2"

    def resume(method: Method, **more: object) -> None:
        run = Run(tmp_path, "transformers", method, **{**options, **more})
        try:
            run.train(start)
        finally:
            assert count_hooks(run.model) == run.hooks

    with pytest.raises(IncompatibleRunError, match="other options"):
        resume(GAST(refresh_every=4, keep=0.25))
    with pytest.raises(IncompatibleRunError, match="other options"):
        resume(GREATS(refresh_every=4))
    (start / TENSORS).rename(start / "aside")
    with pytest.raises(CorruptFileError, match="incomplete"):
        resume(kept)
    (start / FACTS).unlink()
    with pytest.raises(IncompatibleRunError, match="no state of a training method"):
        resume(kept)
