"""What happens between two optimizer steps: log lines, sealed checkpoints, clean interrupts."""

import math
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selectune.errors import TrainingError
from selectune.files import KillPoint, kill_point
from selectune.training.checkpoints import Checkpoints

Log = Callable[[dict[str, Any]], None]


class Interrupts:
    """Hold back Ctrl-C and SIGTERM until the current step is done; the second one is at once."""

    def __init__(self) -> None:
        """Start without a request."""
        self.is_asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        # Python runs signal handlers in the main thread and lets no other one set them.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True


class Watch(TrainerCallback):
    """Report every step, seal what the Trainer saves, and stop where asked to."""

    def __init__(
        self,
        *,
        name: str,
        log: Log,
        checkpoints: Checkpoints,
        interrupts: Interrupts,
        is_cheap_to_save: bool,
        seconds: Callable[[], float],
        last_step: int,
        saves_last: bool = False,
    ) -> None:
        """Keep what the hooks need.

        Args:
            name: of the arm, for the log.
            log: takes one mapping a step.
            checkpoints: seals and prunes the folders that the Trainer writes.
            interrupts: where a signal leaves its request.
            is_cheap_to_save: whether an interrupt may wait for one more checkpoint.
            seconds: training time so far, of earlier processes too.
            last_step: where to end, perhaps before the schedule does.
            saves_last: whether a checkpoint is left there in any case.
        """
        self.name, self.log = name, log
        self.checkpoints, self.interrupts = checkpoints, interrupts
        self.is_cheap_to_save, self.seconds = is_cheap_to_save, seconds
        self.last_step, self.saves_last = last_step, saves_last

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Say where this process starts, so that lines after that step can be dropped."""
        self.log({"arm": self.name, "start": state.global_step, "n_steps": self.last_step})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Pass one step on.

        Raises:
            TrainingError: the gradient is not finite.
        """
        if logs is None or "loss" not in logs:
            return
        row = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm")}
        if not math.isfinite(row["grad_norm"]):
            raise TrainingError(
                f"the gradient of step {state.global_step} is not finite",
                where=f"{self.name}, loss {row['loss']}",
                why="the optimizer has spread it over all trained weights",
                do="lower tune.learning_rate, or use model.dtype=float32",
            )
        self.log({"arm": self.name, "step": state.global_step, **row})

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Turn a request to stop into the Trainer's own way of stopping."""
        kill_point(KillPoint.TUNE_STEP_DONE)
        if state.global_step == self.last_step:
            control.should_training_stop = True
            control.should_save = control.should_save or self.saves_last
        if self.interrupts.is_asked:
            control.should_training_stop = True
            control.should_save = control.should_save or self.is_cheap_to_save

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Make a checkpoint of the folder just written."""
        self.checkpoints.seal(state.global_step, seconds=self.seconds())
        kill_point(KillPoint.TUNE_CHECKPOINT_SAVED)
