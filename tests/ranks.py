"""Tests in several processes: a script is started as each of its ranks, which meet over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import distributed

TESTS = Path(__file__).parent
PAIR = ((0, 2), (1, 2))


def run_ranks(
    script: Path, folder: Path, ranks: Sequence[tuple[int, int]] = PAIR, timeout: float = 300
) -> None:
    """Run a script as several processes at once, and fail with what they said if one fails.

    Args:
        script: a file that ends in `be_rank`.
        folder: where the processes meet and leave their findings.
        ranks: rank and number of processes of each; a process of one meets nobody.
        timeout: seconds.
    """
    paths = [str(TESTS.parent / "src"), str(TESTS), str(TESTS / "reference")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",  # tests of one process see to them
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank), str(n)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, n in ranks
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), "\n".join(outputs)


def be_rank(work: Callable[[Path, int, int], None]) -> NoReturn:
    """Do one process's work, given the folder, its rank and their number, and end the process.

    The process group is never torn down: gloo's destructor waits for a thread of its own, which may
    wait for Python's lock in turn (one in a dozen runs of DDP on a busy machine hung there).
    """
    folder, rank, n = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if n > 1:
        distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=n)
    try:
        work(folder, rank, n)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        leave(1)
    leave(0)


def leave(code: int) -> NoReturn:
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
