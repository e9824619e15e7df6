"""A training method inside transformers.Trainer and trl.SFTTrainer, through public hooks only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selectune.errors import ConfigError, CorruptFileError, IncompatibleRunError
from selectune.training.method import MAX_LENGTH, BatchSource, Method, Scene, Session, Weighting
from selectune.training.reporters import Reporters
from selectune.training.sources import CollatedSource, Indexed
from selectune.training.trainer_arguments import refuse_arguments

FACTS, TENSORS = "selectune_method.json", "selectune_method.safetensors"
# Stands on a model while a callback is at work on it.
_MARK = "_selectune_at_work"


class MethodCallback(TrainerCallback):
    """Put a training method to work between `on_train_begin` and `on_train_end`.

    Its state lies in every checkpoint, so a resumed run goes on as if it had not stopped.

    Attributes:
        session: while training.
        records: step, counted from 1, and what the method did in it.
    """

    def __init__(
        self,
        method: Method,
        *,
        seed: int | None = None,
        sources: tuple[BatchSource | None, BatchSource | None] | None = None,
        weighting: Weighting | None = None,
        precision: str | None = None,
        log: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        """Keep what the hooks need.

        Args:
            method: the method and its options.
            seed: of every draw; None takes the trainer's.
            sources: pool and target examples; None takes the trainer's data set for the pool.
            weighting: how the trainer's loss weighs examples; None finds it out where it matters.
            precision: autocast of the method's own passes; None takes the trainer's.
            log: takes each step and its facts.
        """
        self.method, self.seed, self.sources = method, seed, sources
        self.weighting: Weighting | None = weighting
        self.precision, self.log = precision, log
        self.session: Session | None = None
        self.records: list[tuple[int, dict[str, Any]]] = []
        self._model: nn.Module | None = None
        self._training: TrainerState | None = None
        self._reporters: Reporters | None = None

    def close(self) -> None:
        """Take the method off the model; after an exception nobody else does."""
        if self.session is not None:
            self.session.close()
            self.session = None
        if self._model is not None:
            vars(self._model).pop(_MARK, None)
        self._model = self._training = self._reporters = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Free the model of what a broken training left, before an optimizer is made for it."""
        if model is not None and (left := vars(model).get(_MARK)) is not None:
            left.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,  # noqa: ANN401
        processing_class: Any = None,  # noqa: ANN401
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Hook the method onto the model, at the state of the checkpoint that is resumed."""
        assert model is not None
        self.close()
        refuse_arguments(args)
        _make_free(model, state)
        collate_fn = None if train_dataloader is None else train_dataloader.collate_fn
        pool, target = self.sources or (_pool(train_dataloader, model), None)
        scene = Scene(
            model=model,
            # accelerate wraps the optimizer; the one inside holds the state.
            optimizer=cast("torch.optim.Optimizer", getattr(optimizer, "optimizer", optimizer)),
            seed=args.seed if self.seed is None else self.seed,
            precision=self.precision or _precision(args),
            pool=pool,
            target=target,
            weighting=self.weighting,
            tokenizer=processing_class,
            collate_fn=cast("Any", collate_fn),
            # trl has a limit in its arguments, None for no limit; transformers has none.
            max_length=vars(args).get("max_length") or MAX_LENGTH,
            n_steps=state.max_steps,
        )
        self.session = self.method.start(scene)
        self._model, self._training = model, state
        vars(model)[_MARK] = self
        self.records = []
        try:
            if state.global_step:
                self._load(_resumed(args, state), state)
            self._reporters = Reporters(args, state, control)
        except BaseException:
            self.close()
            raise

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Let the method prepare the step."""
        assert self.session is not None
        self.session.begin_step(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Keep what the method did."""
        assert self.session is not None
        facts = self.session.end_step()
        self.records.append((state.global_step, facts))
        if facts.get("stop"):
            control.should_training_stop = True
        if self.log is not None:
            self.log(state.global_step, facts)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Report the step that the trainer has just reported."""
        if self._reporters is None or not self.records or self.records[-1][0] != state.global_step:
            return
        layers = next((facts["layers"] for _, facts in self.records if "layers" in facts), [])
        self._reporters.tell(self.records[-1][1], layers, args, state, control)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Put the method's state into the checkpoint just written."""
        if self.session is None or not state.is_world_process_zero:
            return
        folder = Path(cast("str", args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir():
            facts, tensors = self.session.state()
            saved = {"facts": facts, "tensors": sorted(tensors), "records": self.records}
            (folder / FACTS).write_text(json.dumps(saved), encoding="utf-8")
            if tensors:
                plain = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
                save_file(plain, folder / TENSORS)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Take the method off the model."""
        self.close()

    def _load(self, folder: Path, state: TrainerState) -> None:
        assert self.session is not None
        name = type(self.method).__name__
        if not (folder / FACTS).exists():
            raise IncompatibleRunError(
                "the checkpoint holds no state of a training method",
                where=str(folder / FACTS),
                why=f"it was saved without {name}, or lies elsewhere than output_dir",
                do=f"resume without {name}, or set resume_from_checkpoint in "
                f"{TrainingArguments.__name__} to the checkpoint's folder, too",
            )
        there = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        # As text: a loss that is no number does not equal itself.
        if json.dumps(there.log_history) != json.dumps(state.log_history):
            raise IncompatibleRunError(
                "the checkpoint that is resumed is not the one with the method's state",
                where=str(folder),
                why="output_dir holds another run's checkpoint of this step",
                do=f"set resume_from_checkpoint in {TrainingArguments.__name__} to the folder "
                "that is resumed, too",
            )
        saved = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        path = folder / TENSORS
        tensors = load_file(path) if path.exists() else {}
        if sorted(tensors) != saved["tensors"]:
            raise CorruptFileError(
                "a training method's state is incomplete",
                where=str(path),
                why=f"it should hold {len(saved['tensors'])} tensors and holds {len(tensors)}",
                do="resume an earlier checkpoint",
            )
        self.session.load_state(saved["facts"], tensors)
        self.records = [(step, facts) for step, facts in saved["records"]]


def _resumed(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the checkpoint's folder, which no hook of the trainers tells."""
    if args.resume_from_checkpoint is not None and Path(args.resume_from_checkpoint).is_dir():
        return Path(args.resume_from_checkpoint)
    return Path(cast("str", args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _make_free(model: nn.Module, state: TrainerState) -> None:
    """Take a method off the model that a training left there when it broke off.

    Raises:
        ConfigError: the method is at work in this very training.
    """
    other = vars(model).get(_MARK)
    if other is None:
        return
    if other._training is state:
        raise ConfigError(
            "two training methods on one model",
            where=f"callbacks, {type(other.method).__name__}",
            why="each would act on what the other leaves, and neither would know",
            do="give one; GAST takes a layer sampler as sampler=",
        )
    other.close()


def _precision(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _pool(loader: DataLoader[Any] | None, model: nn.Module) -> BatchSource | None:
    """Return the trainer's own data set, None where it has no rows by index."""
    if loader is None or isinstance(loader.dataset, IterableDataset):
        return None
    device = next(model.parameters()).device
    dataset = cast("Indexed", loader.dataset)
    return CollatedSource(dataset, cast("Any", loader.collate_fn), device=device)
