import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from crash.scenario import scenario, tree

Run = Callable[..., dict]
TESTS = Path(__file__).parents[1]


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    # A file system in memory, where there is one: thousands of fsyncs would wear out patience.
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="selectune-crash-", dir=place) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def child() -> Iterator[Run]:
    """Return a function that runs the scenario in a process of its own."""
    places = [os.environ.get("PYTHONPATH", ""), str(TESTS.parent / "src"), str(TESTS)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "crash" / "child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(
        root: Path, generation: int, environ: Mapping[str, str] | None = None, max_bytes: int = 0
    ) -> dict:
        job = {
            "root": str(root),
            "generation": generation,
            "environ": dict(environ or {}),
            "max_bytes": max_bytes,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.stdout.close()
    server.wait(timeout=10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what stands on disk after a second generation that nothing disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    scenario(root, 1)
    scenario(root, 2)
    return tree(root)
