"""Named points at which a test can end the process, as a crash would."""

import os
import signal
from collections import Counter
from enum import StrEnum

from selectune.errors import ConfigError, nearest

CRASH_AT = "SELECTUNE_CRASH_AT"
_SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}


class KillPoint(StrEnum):
    """Every place where a crash is worth trying: tests run over this list, and reach all of it."""

    STAGE_OPENED = "stage.opened"
    STAGE_FILE_WRITTEN = "stage.file_written"
    STAGE_FILES_SYNCED = "stage.files_synced"
    STAGE_MANIFEST_WRITTEN = "stage.manifest_written"
    STAGE_MANIFEST_SYNCED = "stage.manifest_synced"
    PROMOTE_OLD_MOVED = "promote.old_moved"
    PROMOTE_RENAMED = "promote.renamed"
    PROMOTE_DONE = "promote.done"
    STORE_SHARD_DONE = "store.shard_done"
    WARMUP_DONE = "warmup.done"
    TUNE_STEP_DONE = "tune.step_done"
    TUNE_CHECKPOINT_SAVED = "tune.checkpoint_saved"
    SCORES_DONE = "scores.done"
    SELECTION_DONE = "selection.done"
    EVALUATE_DONE = "evaluate.done"
    GENERATE_DONE = "generate.done"
    READ_DONE = "read.done"
    CELL_DONE = "cell.done"
    REPORT_DONE = "report.done"
    EMULATE_LAYER_DONE = "emulate.layer_done"


passes: Counter[KillPoint] = Counter()
"""How often this process has passed each point: what a test of coverage reads."""


def kill_point(point: KillPoint) -> None:
    """Do nothing, unless `SELECTUNE_CRASH_AT=name:count:SIGNAL` asks for a signal here.

    Args:
        point: the place that was just passed.

    Raises:
        ConfigError: the variable names no point, no count or no signal of ours.
    """
    passes[point] += 1
    wish = os.environ.get(CRASH_AT)
    if wish is None:
        return
    wanted, count, number = _parse(wish)
    if point is wanted and passes[point] == count:
        signal.raise_signal(number)


def _parse(wish: str) -> tuple[KillPoint, int, signal.Signals]:
    name, _, rest = wish.partition(":")
    count, _, sign = rest.partition(":")
    names = [str(p) for p in KillPoint]
    if name not in names:
        raise ConfigError(f'no kill point "{name}"', where=CRASH_AT, do=nearest(name, names))
    if not count.isdecimal() or int(count) < 1 or sign not in _SIGNALS:
        raise ConfigError(
            f'"{wish}" is not name:count:SIGNAL',
            where=CRASH_AT,
            why=f"count is 1 or more, SIGNAL is one of {', '.join(_SIGNALS)}",
            do=f"write {name}:1:KILL",
        )
    return KillPoint(name), int(count), _SIGNALS[sign]
