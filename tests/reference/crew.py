"""Several processes at one gradient store, forked from one that has its imports behind it.

Reads a list of jobs from stdin, each a round of processes that run side by side, and prints what
every process of every round did.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from tiny import tiny_tokens, tiny_trainable

from selectune.data import Tokens
from selectune.files import CRASH_AT, Crew, KillPoint
from selectune.gradients import store as store_module
from selectune.gradients.engine import GradientEngine
from selectune.gradients.store import GradientStore, Target
from selectune.progress import Silent


def work(folder: Path, how: dict[str, Any], meet: Any, life: tuple[int, int]) -> dict[str, Any]:  # noqa: ANN401
    """Do one process's part.

    With `meet`, hold the first shard until all processes have one. Beside a process that dies, hold
    it until that is dead: only it keeps the writing end of `life`.
    """
    dies, outlives = how.pop("dies", False), how.pop("outlives", False)
    if dies:
        os.environ[CRASH_AT] = "stage.file_written:3:KILL"  # in its second shard, between two files
    else:
        os.close(life[1])
    n_done = 0
    kill_point = store_module.kill_point

    def hold(point: KillPoint) -> None:
        nonlocal n_done
        n_done += 1
        if meet is not None and n_done == 1:
            meet.wait(120)
        if outlives and n_done == 1:
            os.read(life[0], 1)
        kill_point(point)

    store_module.kill_point = hold
    pool = [Tokens(f"z{k}", t.input_ids, t.is_target) for k, t in enumerate(tiny_tokens(24, 1))]
    targets = [Target(t, "task", "") for t in tiny_tokens(4, 2)]
    store = GradientStore(folder / "store", {"name": ""})
    worked = store.work(
        GradientEngine(tiny_trainable("llama", "lora")),
        pool,
        targets,
        pad_id=0,
        token_budget=30,
        shard_examples=3,
        progress=Silent(),
        hands=Crew(folder / ".claims", **how) if how else None,
    )
    if worked.is_complete:
        store.load(targets)
    return {"n_computed": worked.n_computed, "n_done": worked.n_done, "n": worked.n_shards}


def run_round(folder: Path, processes: list[dict[str, Any]], meets: bool) -> list[dict[str, Any]]:
    """Fork one process for each entry, and return what they did, or how they died."""
    folder.mkdir(exist_ok=True)
    meet = multiprocessing.get_context("fork").Barrier(len(processes)) if meets else None
    life = os.pipe()
    pids: list[int] = []
    for k, how in enumerate(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                found = work(folder, how, meet, life)
                (folder / f"found-{k}").write_text(json.dumps(found))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    for end in life:
        os.close(end)
    results: list[dict[str, Any]] = []
    for k, pid in enumerate(pids):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        file = folder / f"found-{k}"
        results.append({"code": code, **(json.loads(file.read_text()) if code == 0 else {})})
        file.unlink(missing_ok=True)
    return results


if __name__ == "__main__":
    print(json.dumps([run_round(Path(f), ps, m) for f, ps, m in json.load(sys.stdin)]))
