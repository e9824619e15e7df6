"""Train one adapter on exactly the given tokens, and resume where a killed process stopped."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from selectune import files
from selectune.data.tokens import Tokens
from selectune.errors import ConfigError, DataError, TrainingError
from selectune.models import trainable_fingerprint
from selectune.recipe import TuneSection
from selectune.training.callback import Interrupts, Log, Watch
from selectune.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    identify,
    open_earlier,
    refuse_other,
)
from selectune.training.method import Method
from selectune.training.method_callback import FACTS, TENSORS, MethodCallback
from selectune.training.order import EpochBatches
from selectune.training.sources import TokenSource
from selectune.training.sparse import SparseModel
from selectune.training.trainers import (
    Collate,
    TransformersArm,
    count_moved,
    snapshot,
    trainable,
)
from selectune.training.weights import load_weights, save_weights

KIND = "adapter"
Record = tuple[int, dict[str, Any]]
_RECORDS = "records.json"
_CHEAP_BYTES = 256 * 2**20  # a checkpoint that an interrupt may wait for: well under a second


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a training that sees examples of its own.

    Attributes:
        end: its last step, counted over the whole training; None for the end of the schedule.
        start: the checkpoint of the phase before, from which it goes on; None for the first one.
        behind: what tells the phases before it from others: their last steps and examples.
    """

    end: int | None = None
    start: Path | None = None
    behind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TuneResult:
    """A finished training run.

    Attributes:
        path: folder with the trained adapter, or the whole model where there is no adapter.
        n_steps: optimizer steps.
        seconds: training time, summed over all processes that took part.
        peak_bytes: most memory in use: of the process on a CPU, of torch's tensors on a GPU.
        losses: step, counted from 1, and mean nats per target token of that step's examples.
        n_trainable: entries that could move.
        n_moved: entries that did.
        records: step, counted from 1, and what the training method did in it; empty without one.
    """

    path: Path
    n_steps: int
    seconds: float
    peak_bytes: int
    losses: list[tuple[int, float]]
    n_trainable: int
    n_moved: int
    records: list[Record] = field(default_factory=list[Record])


def tune(
    model: nn.Module,
    items: Sequence[Tokens],
    options: TuneSection,
    *,
    output: Path,
    seed: int,
    pad_id: int,
    precision: str,
    device: str,
    fingerprint: str,
    name: str,
    log: Log,
    method: Method | None = None,
    target: Sequence[Tokens] = (),
    stop_after_epochs: int | None = None,
    phase: Phase | None = None,
) -> TuneResult:
    """Train `model` in place; afterwards it holds the trained weights, reused results included.

    The same call again continues from the newest valid checkpoint, or gives back what is finished,
    and ends in the bytes of a run that was never stopped.

    Args:
        model: wrapped by peft, or bare with `requires_grad` set; trainable weights become fp32.
        items: tokens and targets, used as they are.
        options: the `tune` section of a recipe.
        output: folder for `checkpoint-N` and, at the end, `adapter`.
        seed: of dropout and of the order of examples.
        pad_id: token id that fills up the rows of a batch.
        precision: "float32", or "bfloat16" for autocast around each forward pass.
        device: "cpu" or "cuda".
        fingerprint: of everything else that the result depends on: base, pool, selection.
        name: of the arm, for the log.
        log: takes {"arm", "start", "n_steps"} once, {"arm", "step", "loss", "learning_rate",
            "grad_norm"} after each step, and {"arm", "warning"} where something is worth reading.
        method: acts during training; None for plain training. `options.method` is not read.
        target: examples that stand for the task, for methods that look at them.
        stop_after_epochs: end there although the learning rate is laid out for `options.epochs`.
        phase: the part of a training that sees these examples; None for all of it. Its
            checkpoints, and what is returned, hold the losses of the phases before.

    Raises:
        DataError: nothing to train on, or an example without a target.
        ConfigError: nothing is trainable, or this machine cannot run it.
        TrainingError: the loss or gradient is not finite, or no weight moved.
        IncompatibleRunError: `output` holds the work of another run.
        StorageError: the disk has no room for the checkpoints.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the current step and a cheap checkpoint.
    """
    _refuse_unusable(model, items, device)
    for parameter in trainable(model).values():
        # bf16 weights would round most updates away.
        parameter.data = parameter.data.float()
    identity = identify(
        items,
        options,
        start=trainable_fingerprint(model),
        method=method,
        target=target,
        fingerprint=fingerprint,
        seed=seed,
        pad_id=pad_id,
        precision=precision,
        device=device,
        stop_after_epochs=stop_after_epochs,
        **({} if phase is None else {"phase": [phase.end, *phase.behind]}),
    )
    phase = phase or Phase()
    final = output / "adapter"
    if files.is_complete(final, KIND):
        return _reuse(model, final, identity)

    batches = EpochBatches(
        [len(item.input_ids) for item in items],
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        seed=seed,
    )
    every = options.save_every or batches.n_steps
    last_step = batches.n_steps * min(stop_after_epochs or options.epochs, options.epochs)
    last_step = phase.end or last_step
    checkpoints = Checkpoints(
        output,
        identity=identity,
        keep=options.keep_checkpoints,
        every=every,
        warn=lambda text: log({"arm": name, "warning": text}),
    )
    newest = checkpoints.newest()
    if newest is None and phase.start is not None:
        newest = open_earlier(phase.start, identity)
    seconds = _stopwatch(0.0 if newest is None else newest.seconds)
    before = snapshot(model)
    n_trainable = sum(t.numel() for t in before.values())
    checkpoint_bytes = _checkpoint_bytes(model, n_trainable)
    if method is not None:
        checkpoint_bytes += 4 * n_trainable  # a gradient that it may keep
    acting = None
    if method is not None:
        pool, aims = (TokenSource(x, pad_id=pad_id, device=device) for x in (items, target))
        acting = MethodCallback(
            method,
            seed=seed,
            sources=(pool, aims if aims.n else None),
            weighting="token",
            precision=precision,
        )
    files.check_free_space(output, checkpoint_bytes * (options.keep_checkpoints + 2))
    interrupts = Interrupts()
    watch = Watch(
        name=name,
        log=log,
        checkpoints=checkpoints,
        interrupts=interrupts,
        is_cheap_to_save=checkpoint_bytes <= _CHEAP_BYTES,
        seconds=seconds,
        last_step=last_step,
        saves_last=phase.end is not None,
    )
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()

    def train(start: Checkpoint | None) -> tuple[list[dict[str, Any]], int]:
        with _borrowed(model), interrupts:
            arguments = _arguments(
                options, batches, output, seed, precision, device, every, stop_after_epochs
            )
            trainer = _build(
                options.trainer, model, items, arguments, acting, watch, batches, pad_id
            )
            path = None if start is None else str(start.path)
            arguments.resume_from_checkpoint = path  # a method looks for its state there
            with checkpoints.written_by_others(), _closing(acting):
                cast("Any", trainer).train(resume_from_checkpoint=path)
            state = trainer.state
        if interrupts.is_asked:
            raise KeyboardInterrupt
        return cast("list[dict[str, Any]]", state.log_history), state.global_step

    # Read by itself: a fact may be no number, which `read_json` refuses.
    saved: list[Any] = []
    if newest is not None and method is not None:
        saved = json.loads(newest.opened.read_text(FACTS))["records"]
    was_last = bool(saved) and bool(saved[-1][1].get("stop"))
    if newest is not None and (newest.step >= last_step or was_last):
        # Killed between the last checkpoint and the adapter. The Trainer cannot be asked for no
        # step at all: it looks at a wish to stop only after one.
        log({"arm": name, "start": newest.step, "n_steps": newest.step})
        history, n_steps = _load(model, newest.opened), newest.step
        records = _records(saved)
    else:
        history, n_steps = train(newest)
        records = [] if acting is None else _records(acting.records)
    n_moved = _n_moved(model, before)
    # A phase that others follow may end while the learning rate still is zero.
    if n_moved == 0 and phase.end is None:
        raise TrainingError(
            f"none of the {n_trainable:,} trainable weights moved in {n_steps} steps",
            where=name,
            why="the adapter would be the base model",
            do="raise tune.learning_rate or tune.epochs, or lower tune.warmup_ratio",
        )
    result = TuneResult(
        path=final,
        n_steps=n_steps,
        seconds=seconds(),
        peak_bytes=_peak_bytes(device),
        losses=[(int(row["step"]), float(row["loss"])) for row in history if "loss" in row],
        n_trainable=n_trainable,
        n_moved=n_moved,
        records=records,
    )
    _save(model, result, identity)
    is_end = n_steps in (batches.n_steps * options.epochs, phase.end)
    checkpoints.finish(n_steps if is_end else None)
    return result


def _refuse_unusable(model: nn.Module, items: Sequence[Tokens], device: str) -> None:
    empty = [item.id for item in items if not item.is_target[1:].any()]
    if not items or empty:
        raise DataError(
            "there is no example to train on"
            if not items
            else f"{len(empty)} of {len(items)} examples have no target token",
            where="example " + ", ".join(empty[:5]) if empty else "tune",
            why="a loss is a mean over target tokens",
            do="raise select.budget or data.max_length",
        )
    if not trainable(model):
        raise ConfigError(
            "no weight of the model is trainable",
            where="adapter",
            do="add an adapter, or unfreeze some layers",
        )
    if device != "cpu" and torch.cuda.device_count() > 1:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible, and one is used",
            where="model.device",
            why="the Trainer would split each batch over all of them in one process",
            do="set CUDA_VISIBLE_DEVICES to one of them",
        )


def _arguments(
    options: TuneSection,
    batches: EpochBatches,
    output: Path,
    seed: int,
    precision: str,
    device: str,
    every: int,
    stop_after_epochs: int | None,
) -> TrainingArguments:
    n_steps = batches.n_steps * options.epochs
    # The same rates whenever it ends early: what is kept of a first epoch is that of a longer run.
    n_run = batches.n_steps * (1 if stop_after_epochs else options.epochs)
    common: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.scheduler,
        # A rate that only rises would leave a run of one step with a rate of 0.
        "warmup_steps": min(math.ceil(options.warmup_ratio * n_steps), n_run - 1),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": options.optimizer,
        "logging_steps": 1,
        # True would replace a NaN by the mean so far.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": every,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "bf16": precision == "bfloat16",
        "activation_checkpointing": False,
        "seed": seed,
        "data_seed": seed,
        "dataloader_pin_memory": device != "cpu",
        "remove_unused_columns": False,
    }
    if options.trainer == "trl":
        from selectune.training.trl_arm import sft_arguments

        return sft_arguments(common)
    return TrainingArguments(**common)


def _build(
    trainer: str,
    model: nn.Module,
    items: Sequence[Tokens],
    arguments: TrainingArguments,
    acting: MethodCallback | None,
    watch: Watch,
    batches: EpochBatches,
    pad_id: int,
) -> TransformersArm:
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "data_collator": Collate(items, pad_id),
        # In this order the method's files are in a checkpoint when it is sealed.
        "callbacks": [watch] if acting is None else [acting, watch],
        "batches": batches,
        "acting": acting,
    }
    indices = list(range(len(items)))
    if trainer != "trl":
        return TransformersArm(train_dataset=indices, **common)
    from datasets import Dataset

    from selectune.training.trl_arm import TrlArm

    rows = cast("Any", Dataset).from_dict({"index": indices})
    return TrlArm(train_dataset=rows, **common)


def _save(model: nn.Module, result: TuneResult, identity: dict[str, Any]) -> None:
    meta = {
        "identity": identity,
        "n_steps": result.n_steps,
        "n_trainable": result.n_trainable,
        "n_moved": result.n_moved,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
    }
    with files.staged(result.path, kind=KIND, meta=meta) as stage:
        save_weights(model, stage.path)
        stage.write_json("losses.json", [list(pair) for pair in result.losses])
        if result.records:
            stage.write_json(_RECORDS, [list(pair) for pair in result.records])


def find_tuned(
    items: Sequence[Tokens],
    options: TuneSection,
    *,
    output: Path,
    method: Method | None = None,
    target: Sequence[Tokens] = (),
    **rest: object,
) -> TuneResult | None:
    """Return what `tune` left in `output` for the same arguments; None where it left nothing.

    No model is needed: where its weights started follows from `fingerprint` and `seed`.

    Args:
        items: as all the others, what `tune` was given.
        options: how to train.
        output: its folder.
        method: that acted during training.
        target: the target examples.
        rest: seed, pad_id, precision, device and fingerprint.

    Raises:
        CorruptFileError: the result is damaged.
    """
    final = output / "adapter"
    if not files.is_complete(final, KIND):
        return None
    opened = files.open_dir(final, kind=KIND)
    found = opened.meta["identity"]
    wanted = identify(
        items,
        options,
        start=found["start"],
        method=method,
        target=target,
        stop_after_epochs=None,
        **rest,
    )
    return _read(opened) if found == wanted else None


def _reuse(model: nn.Module, path: Path, identity: dict[str, Any]) -> TuneResult:
    opened = files.open_dir(path, kind=KIND)
    refuse_other(opened.meta["identity"], identity, where=path)
    load_weights(model, opened)
    return _read(opened)


def _read(opened: files.Opened) -> TuneResult:
    meta = opened.meta
    losses = cast("list[tuple[int, float]]", opened.read_json("losses.json"))
    return TuneResult(
        path=opened.path,
        n_steps=meta["n_steps"],
        seconds=meta["seconds"],
        peak_bytes=meta["peak_bytes"],
        losses=[(step, loss) for step, loss in losses],
        n_trainable=meta["n_trainable"],
        n_moved=meta["n_moved"],
        records=_records(opened.read_json(_RECORDS)) if _RECORDS in opened.names else [],
    )


def _records(saved: Sequence[Sequence[Any]]) -> list[Record]:
    return [(int(step), _plain(facts)) for step, facts in saved]


def _plain(fact: Any) -> Any:  # noqa: ANN401
    """Return a fact with null for what is no number: files of ours hold plain JSON."""
    if isinstance(fact, dict):
        return {key: _plain(value) for key, value in cast("dict[str, Any]", fact).items()}
    if isinstance(fact, list):
        return [_plain(value) for value in cast("list[Any]", fact)]
    return None if isinstance(fact, float) and not math.isfinite(fact) else fact


def _load(model: nn.Module, checkpoint: files.Opened) -> list[dict[str, Any]]:
    load_weights(model, checkpoint, but=TENSORS)
    return checkpoint.read_json("trainer_state.json")["log_history"]


@contextmanager
def _closing(acting: MethodCallback | None) -> Generator[None]:
    """Take the method off the model, also where training ends by an exception."""
    try:
        yield
    finally:
        if acting is not None:
            acting.close()


@contextmanager
def _borrowed(model: nn.Module) -> Generator[None]:
    """Give the model back as it came: accelerate and trl replace `forward` for good."""
    modules = list(model.modules())
    before = {id(m): m.__dict__.get("forward") for m in modules}
    was_training = model.training
    try:
        yield
    finally:
        for module in modules:
            forward = before[id(module)]
            if module.__dict__.get("forward") is not forward:
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward
        model.train(was_training)


def _n_moved(model: nn.Module, before: Mapping[str, Tensor]) -> int:
    if not isinstance(model, SparseModel):
        return count_moved(model, before)
    # Of single weights the stored bits count: a value may move, and its weight round back.
    values = {id(p) for p in model.sparse.parameters()}
    own = {name for name, p in trainable(model).items() if id(p) in values}
    rest = {name: t for name, t in before.items() if name not in own}
    return model.sparse.moved() + count_moved(model, rest)


def _stopwatch(already: float) -> Callable[[], float]:
    start = time.perf_counter()
    return lambda: already + time.perf_counter() - start


def _checkpoint_bytes(model: nn.Module, n_trainable: int) -> int:
    """Bound what a checkpoint takes: the weights, and two moments for each trained one."""
    from peft import PeftModel

    weights = 4 * n_trainable
    if isinstance(model, SparseModel):
        weights *= 3  # the values, and the delta with its indices
    elif not isinstance(model, PeftModel):
        weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return weights + 8 * n_trainable


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
