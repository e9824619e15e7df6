"""A training method inside transformers.Trainer and trl.SFTTrainer, through public hooks only."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selectune.errors import ConfigError, IncompatibleRunError
from selectune.training.method import BatchSource, Method, Scene, Session, Weighting
from selectune.training.ranks import world
from selectune.training.sources import CollatedSource

FACTS, TENSORS = "selectune_method.json", "selectune_method.safetensors"


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

    def close(self) -> None:
        """Take the method off the model; after an exception nobody else does."""
        if self.session is not None:
            self.session.close()
            self.session = None

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
        _refuse_arguments(args)
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
        )
        self.session = self.method.start(scene)
        self.records = []
        if state.global_step:
            self._load(Path(cast("str", args.output_dir)) / f"checkpoint-{state.global_step}")

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
        if self.log is not None:
            self.log(state.global_step, facts)

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
        folder = Path(cast("str", args.output_dir)) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            facts, tensors = self.session.state()
            saved = {"method": repr(self.method), "facts": facts, "records": self.records}
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

    def _load(self, folder: Path) -> None:
        assert self.session is not None
        if not (folder / FACTS).exists():
            raise IncompatibleRunError(
                "the checkpoint holds no state of a training method",
                where=str(folder / FACTS),
                why=f"it was saved by a run without {type(self.method).__name__}",
                do="resume without the method, or train from the start",
            )
        saved = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS) if (folder / TENSORS).exists() else {}
        self.session.load_state(saved["facts"], tensors)
        self.records = [(step, facts) for step, facts in saved["records"]]


def _precision(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _pool(loader: DataLoader[Any] | None, model: nn.Module) -> BatchSource | None:
    """Return the trainer's own data set, None where it has no rows by index."""
    if loader is None or isinstance(loader.dataset, IterableDataset):
        return None
    device = next(model.parameters()).device
    dataset = cast("Sequence[Any]", loader.dataset)
    return CollatedSource(dataset, cast("Any", loader.collate_fn), device=device)


def _refuse_arguments(args: TrainingArguments) -> None:
    """Check what the trainer was told.

    Raises:
        ConfigError: it cannot work with a method that chooses examples or layers.
    """
    asked = vars(args)
    for key in ("packing", "padding_free", "use_liger_kernel"):
        if asked.get(key):
            raise ConfigError(
                f"{key}=True cannot be used with a training method",
                where=f"{type(args).__name__}.{key}",
                why="a fused loss hides what layers see"
                if key == "use_liger_kernel"
                else "a row then holds several examples, which cannot be told apart",
                do=f"set {key}=False",
            )
    if asked.get("deepspeed") or asked.get("fsdp"):
        raise ConfigError(
            "a training method runs under plain DDP only",
            where=f"{type(args).__name__}.{'deepspeed' if asked.get('deepspeed') else 'fsdp'}",
            why="sharded parameters have no gradient that a layer could deliver, and must not be "
            "frozen after the first step",
            do="use one process, or DDP",
        )
    if world() > 1 and args.ddp_find_unused_parameters is False:
        raise ConfigError(
            "ddp_find_unused_parameters=False cannot be used with a training method",
            where=f"{type(args).__name__}.ddp_find_unused_parameters",
            why="DDP would wait for the gradients of layers that are frozen in this step",
            do="set ddp_find_unused_parameters=True",
        )
