"""Every document's code blocks run.

A block says after its language what happens to it: `bash run` and `python run` blocks of one
document are executed in order, in a folder made by `workspace.make_workspace`; `bash show` and
`python show` are only read; `yaml recipe` must load.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from workspace import make_workspace

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^ *```(?P<info>[^\n`]*)\n(?P<text>.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)


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


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program where `selectune` is this checkout's, and return what it said."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    for name, words_of in (("selectune", "-m selectune"), ("python", "")):
        shim = programs / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words_of} "$@"\n')
        shim.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / ".cache"),
    }
    return subprocess.run(
        words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_shell_and_python_block_says_whether_it_runs(document: Path) -> None:
    unmarked = [
        block.line
        for block in blocks(document)
        if block.language in ("bash", "sh", "console", "shell", "python")
        and (block.language not in ("bash", "python") or block.use not in ("run", "show"))
    ]
    assert not unmarked, f'{document.name}: write "bash run" or "bash show" at lines {unmarked}'


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_blocks_of_a_document_run_in_order(document: Path, tmp_path: Path) -> None:
    runnable = [block for block in blocks(document) if block.use == "run"]
    if not runnable:
        return
    make_workspace(tmp_path)
    for block in runnable:
        interpreter = ["bash", "-euo", "pipefail"] if block.language == "bash" else [sys.executable]
        done = run([*interpreter, "-c", block.text], tmp_path)
        assert done.returncode == 0, f"{document.name}:{block.line}\n{done.stdout}\n{done.stderr}"


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
