"""A process that forks one child per line of its input: hundreds of crashes in seconds.

In: {"root", "generation", "environ", "max_bytes"}; out: {"code", "message"}. The children never
import torch or numpy, and behave as the command line does: SIGTERM is an interrupt (130), an error
of ours is a message (1); anything else is a traceback (99).
"""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from crash.scenario import scenario
from selectune.errors import SelectuneError


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _run(job, theirs)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            message = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "message": message}), flush=True)


def _run(job: dict, out: int) -> NoReturn:
    code, message = 0, ""
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        os.environ.update(job["environ"])
        if job["max_bytes"]:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_bytes"], hard))
        scenario(Path(job["root"]), job["generation"])
    except KeyboardInterrupt:
        code = 130
    except SelectuneError as error:
        code, message = 1, f"{type(error).__name__}: {error}"
    except BaseException:
        code, message = 99, traceback.format_exc()
    os.write(out, message.encode())
    os._exit(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
