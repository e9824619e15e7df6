"""A small grid for the command line, and what it leaves that must not depend on how it was made."""

import json
from pathlib import Path
from typing import Any

from small_run import small_recipe
from unit.test_transfer_in_compare import two_tasks

# gist and less share a warm-up, whose checkpoints stay, and a look at the gradients of one.
MATRIX = """
matrix:
  methods: [gist, less]
  seeds: [0, 1]
  tune: {learning_rate: [1e-2, 1e-5]}
"""
TRANSFER = """
matrix:
  methods:
    - {name: gallop, method: random, tune: {weights: {method: gallop, density: 0.1}}}
  seeds: [0, 1]
  transfer: true
  tune: {learning_rate: [1e-2, 1e-5]}
"""
WISHES = (
    "warmup.schedule_epochs=2",
    "tune.epochs=1",
    "evaluate.limit=4",
    "evaluate.generate=true",
)
CLOCK = frozenset(
    {"costs", "seconds", "seconds_per_step", "time_ratio", "peak_ratio", "peak_bytes"}
)
Found = dict[str, Any]


def command(folder: Path, matrix: str = MATRIX) -> list[str | Path]:
    """Fill a folder with a grid that also writes answers and reads text; return how to call it."""
    rows = (json.dumps({"text": text}) + "\n" for text in ("Nobody knows.", "One is one."))
    (folder / "text.jsonl").write_text("".join(rows))
    recipe = (two_tasks if matrix == TRANSFER else small_recipe)(folder, matrix)
    return ["--quiet", recipe, *WISHES, f"evaluate.text={folder}/text.jsonl"]


def contents(run: Path) -> Found:
    """Return the table and every cell with its recipe, without what a clock says."""
    home = str(run.parent)
    table = (run / "table.json").read_text().replace(home, "")
    found: Found = {"table.json": without_clock(json.loads(table))}
    for path in sorted(run.glob("cells/*/*")):
        name = path.relative_to(run).as_posix()
        if path.suffix == ".parquet":
            found[name] = path.read_bytes()
            continue
        text = path.read_text().replace(home, "")
        found[name] = without_clock(json.loads(text)) if path.suffix == ".json" else text
    return found


def without_clock(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: without_clock(v) for key, v in value.items() if key not in CLOCK}
    return [without_clock(v) for v in value] if isinstance(value, list) else value
