"""A whole run in small: a recipe over a workspace, in this process or as a user starts it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from workspace import make_workspace

RECIPE = """
output: {folder}/run
model: {{base: {folder}/model, dtype: float32, device: cpu}}
data:
  pool: {folder}/pool.jsonl
  target: {{colours: {folder}/target.jsonl}}
  heldout: {{colours: {folder}/heldout.jsonl}}
  max_length: 128
adapter: {{rank: 2, alpha: 4.0, modules: [q_proj, v_proj]}}
warmup: {{fraction: 0.2}}
score: {{method: gist, token_budget: 400, shard_examples: 16}}
select: {{budget: 9}}
tune: {{epochs: 2, batch_size: 4, learning_rate: 1e-2, save_every: 2}}
evaluate: {{intervals: 200}}
"""


def small_recipe(folder: Path, more: str = "") -> Path:
    """Fill a folder with a workspace and a recipe for it, and return the recipe's path."""
    make_workspace(folder)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder) + more, encoding="utf-8")
    return path


def selectune(
    *arguments: str | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a child process."""
    return subprocess.run(
        [sys.executable, "-m", "selectune", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=600,
        check=False,
    )
