"""The command line in a process that has its imports behind it: one fork for each command.

A verb that trains needs five seconds of imports and one of work; crashes are tried by the dozen.

    with WarmCli() as cli:
        done = cli("run", recipe, env={CRASH_AT: "warmup.done:1:KILL"})
"""

import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn


@dataclass(frozen=True)
class Done:
    """How a command ended; `passes` counts its kill points, unless it was killed or kept short."""

    code: int
    out: str
    err: str
    passes: Mapping[str, int]


class WarmCli:
    """Runs commands one after the other, each in a fork of one warm process.

    Args:
        imports: further modules that are there already.
    """

    def __init__(self, *imports: str) -> None:
        self._imports = imports

    def __enter__(self) -> "WarmCli":
        # Libraries read this when they are imported, which here is before any command.
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, *self._imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)

    def __call__(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        max_bytes: int = 0,
        cwd: str | Path = ".",
    ) -> Done:
        """Run one command; no file of it may grow beyond `max_bytes`, where that is not 0."""
        words = [*map(str, arguments)]
        return self._do(argv=words, env=dict(env or {}), max_bytes=max_bytes, cwd=str(cwd))

    def python(self, code: str, *, cwd: str | Path) -> Done:
        """Run a program in Python, in a folder."""
        return self._do(code=code, cwd=str(cwd))

    def _do(self, **job: object) -> Done:
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))


def main() -> None:
    # What a run would import: the fork finds it there.
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import selectune.training  # noqa: F401

    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # each training ends in a full collection
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory(prefix="selectune-warm-") as name:
            folder = Path(name)
            pid = os.fork()
            if pid == 0:
                _run(job, folder)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            passes = folder / "passes"
            answer = {
                "code": code,
                "out": (folder / "out").read_text(),
                "err": (folder / "err").read_text(),
                "passes": json.loads(passes.read_text()) if passes.exists() else {},
            }
        print(json.dumps(answer), flush=True)


def _run(job: dict, folder: Path) -> NoReturn:
    code = 99
    try:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), fd)
        os.chdir(job["cwd"])
        os.environ.update(job.get("env", {}))
        if job.get("max_bytes"):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_bytes"], hard))
        try:
            code = _exec(job["code"]) if "code" in job else _command(job["argv"])
        except Exception:
            sys.excepthook(*sys.exc_info())  # as the interpreter would, were it the end
            code = 1
        from selectune.files import passes

        sys.stdout.flush()
        sys.stderr.flush()
        if not job.get("max_bytes"):
            (folder / "passes").write_text(json.dumps(passes))
    finally:
        os._exit(code)


def _command(words: list[str]) -> int:
    from selectune.cli import main as cli

    return cli(words)


def _exec(code: str) -> int:
    exec(code, {"__name__": "__main__"})  # noqa: S102
    return 0


if __name__ == "__main__":
    main()
