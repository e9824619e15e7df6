"""Every document's code blocks run.

A block says after its language what happens to it: `bash run` and `python run` blocks of one
document are executed in order, in a folder made by `workspace.make_workspace` and `BEFORE`;
`python more` is what a reader types after the Python blocks before it, which run first once more;
`bash show` and `python show` (installing, signatures) are only read; `yaml recipe` must load.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from socketserver import StreamRequestHandler, UnixStreamServer
from threading import Thread

import numpy as np
import pytest
import yaml

from guard.sitecustomize import SHOWS_BITSANDBYTES
from unit.interchange.test_bergson import make_index, make_scores
from warm import WarmCli
from workspace import make_workspace

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
USES = {"bash": ("run", "show"), "python": ("run", "more", "show")}
_FENCE = re.compile(r"^ *```(?P<info>[^\n`]*)\n(?P<text>.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)


RECIPE = """
model: {base: model}
data: {pool: pool.jsonl, target: target.jsonl, heldout: heldout.jsonl, max_length: 256}
tune: {epochs: 1}
"""


def write_recipes(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)
    grid = "matrix: {methods: [gist], seeds: [0, 1]}"
    (folder / "grid.yaml").write_text(RECIPE + grid)


def write_what_bergson_leaves(folder: Path) -> None:
    write_recipes(folder)
    rng = np.random.default_rng(0)
    n = len((folder / "pool.jsonl").read_text().splitlines())
    (folder / "runs").mkdir()
    make_scores(folder / "runs/bergson-scores", rng.normal(size=(n, 2)))
    config = {"steps": [{"score": {"score_cfg": {"higher_is_better": True}}}]}
    (folder / "runs/bergson-scores/config.yaml").write_text(yaml.safe_dump(config))
    make_index(folder / "runs/pool-index", rng.normal(size=(n, 5)))
    make_index(folder / "runs/target-index", rng.normal(size=(6, 5)))


# What a reader of a document has before its first block.
BEFORE: Mapping[str, Callable[[Path], None]] = {
    "docs/processes.md": write_recipes,
    "docs/guides/bergson.md": write_what_bergson_leaves,
}


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    use: str
    text: str
    line: int


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        language, _, use = found["info"].strip().partition(" ")
        yield Block(language, use, found["text"], text.count("\n", 0, found.start()) + 1)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Stands for `selectune` in a shell: hands its words on to a warm process, and says what that says.
CLIENT = """#!{python} -SE
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
asked.sendall(json.dumps([os.getcwd(), *sys.argv[1:]]).encode() + b"\\n")
answer = json.loads(asked.makefile().readline())
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCli]:
    """Return a process that has imported what the documents do, five to ten seconds a block."""
    with WarmCli("datasets", "trl", "selectune.pipeline.run", "selectune.report") as cli:
        yield cli


@contextmanager
def programs(folder: Path, warm: WarmCli) -> Iterator[dict[str, str]]:
    """Yield an environment in which `selectune` is this checkout's, and warm."""
    address = folder / "socket"

    class Hand(StreamRequestHandler):
        def handle(self) -> None:
            cwd, *words = json.loads(self.rfile.readline())
            done = warm(*words, cwd=cwd, env={"XDG_CACHE_HOME": str(folder / ".cache")})
            self.wfile.write(json.dumps(asdict(done)).encode() + b"\n")

    place = folder / ".programs"
    place.mkdir()
    shims = {
        "selectune": CLIENT.format(python=sys.executable, address=str(address)),
        "torchrun": f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
    }
    for name, text in shims.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    with UnixStreamServer(str(address), Hand) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {
                **os.environ,
                "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
                "XDG_CACHE_HOME": str(folder / ".cache"),
            }
        finally:
            server.shutdown()


def run(words: list[str], folder: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """Run a program in a process of its own, and return its code and what it said."""
    done = subprocess.run(
        words, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.returncode, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_shell_and_python_block_says_whether_it_runs(document: Path) -> None:
    unmarked = [
        block.line
        for block in blocks(document)
        if block.language in ("bash", "sh", "console", "shell", "python")
        and block.use not in USES.get(block.language, ())
    ]
    assert not unmarked, f"{document.name}: say {USES} at lines {unmarked}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_blocks_of_a_document_run_in_order(
    document: Path, warm: WarmCli, tmp_path: Path
) -> None:
    runnable = [block for block in blocks(document) if block.use in ("run", "more")]
    if not runnable:
        return
    make_workspace(tmp_path)
    BEFORE.get(name_of(document), lambda folder: None)(tmp_path)
    typed = ""  # of Python, since the last block that stands alone
    with programs(tmp_path, warm) as env:
        for block in runnable:
            if block.language == "python":
                typed = block.text if block.use == "run" else typed + block.text
            if block.language == "bash":
                code, said = run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path, env)
            elif "BitsAndBytes" in typed:
                shown = {**env, SHOWS_BITSANDBYTES: "1"}
                code, said = run([sys.executable, "-c", typed], tmp_path, shown)
            else:
                done = warm.python(typed, cwd=tmp_path)
                code, said = done.code, f"{done.out}\n{done.err}"
            assert code == 0, f"{document.name}:{block.line}\n{said}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_verb_that_a_document_names_exists(document: Path) -> None:
    from selectune.cli.app import app

    verbs = {command.name for command in app.registered_commands}
    shell = [block for block in blocks(document) if block.language == "bash"]
    named = {
        found[1]
        for block in shell
        for found in re.finditer(r"^\s*(?:\S*/)?selectune ([a-z]\w*)", block.text, re.MULTILINE)
    }
    assert named <= verbs


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_recipe_in_a_document_loads(document: Path, tmp_path: Path) -> None:
    from selectune.recipe import load_recipe

    for block in blocks(document):
        if (block.language, block.use) == ("yaml", "recipe"):
            path = tmp_path / f"line{block.line}.yaml"
            path.write_text(block.text, encoding="utf-8")
            load_recipe(path, [])
