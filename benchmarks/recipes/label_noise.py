"""Which ways of training resist wrong answers?

A fifth of the pool's answers of each task give way to another of their options; targets and
held-out examples stay as they are. The rows of `layers.yaml` that are asked for are trained on that
pool, beside plain LoRA.

    python benchmarks/recipes/label_noise.py FOLDER [--share 0.2] [--rows gast,ist] [key=value ...]
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from selectune.cli import main as selectune
from selectune.pipeline.prepare import resolve
from selectune.recipe import Recipe, load_recipe

RECIPE = Path(__file__).with_name("layers.yaml")
ROWS = "gast,gast random,gast topk,greats,ist"


def with_wrong_answers(rows: Sequence[Mapping[str, Any]], share: float) -> list[dict[str, Any]]:
    """Return rows of which a share, of each task alike, has a wrong option for its answer.

    Which ones, and which option, is fixed by their content: a larger share adds to a smaller one's.

    Args:
        rows: with `prompt`, `completion`, `options` and `source`.
        share: of the rows of each source.
    """
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: _drawn(row["prompt"])):
        by_source.setdefault(row["source"], []).append(row)
    wrong = {
        row["prompt"] for mine in by_source.values() for row in mine[: round(share * len(mine))]
    }
    found: list[dict[str, Any]] = []
    for row in rows:
        others = [option for option in row["options"] if option != row["completion"]]
        n = int.from_bytes(_drawn("option " + row["prompt"])[:8], "big")
        is_wrong = row["prompt"] in wrong
        found.append({**row, "completion": others[n % len(others)]} if is_wrong else dict(row))
    return found


def _drawn(text: str) -> bytes:
    return hashlib.sha256(f"noise {text}".encode()).digest()


def _rows(recipe: Recipe, names: Sequence[str]) -> list[Any]:
    assert recipe.matrix is not None
    known = {
        row if isinstance(row, str) else row.name: row if isinstance(row, str) else row.model_dump()
        for row in recipe.matrix.methods
    }
    strange = [name for name in names if name not in known]
    if strange:
        sys.exit(f"no row {strange[0]!r} in {RECIPE.name}; its rows are {', '.join(known)}")
    return [known["random"], *(known[name] for name in names)]


def run(folder: Path, share: float, names: Sequence[str], overrides: Sequence[str]) -> int:
    """Write the pool and compare the rows on it; the same command again resumes."""
    clean = load_recipe(RECIPE)
    pool = str(resolve(clean).data.pool)
    lines = Path(pool).read_text(encoding="utf-8").splitlines()
    noisy = with_wrong_answers([json.loads(line) for line in lines], share)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pool.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in noisy), encoding="utf-8"
    )
    rows = yaml.safe_dump(_rows(clean, names), default_flow_style=True, width=10**6).strip()
    given = [f"data.pool={path}", f"output={folder / 'run'}", f"matrix.methods={rows}"]
    return selectune(["compare", str(RECIPE), *given, *overrides])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    sys.exit(run(asked.folder, asked.share, asked.rows.split(","), asked.overrides))
