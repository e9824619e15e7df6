"""The two houses of offsite tuning in small: an owner's folder, and a data owner's beside it."""

from pathlib import Path

from small_run import RECIPE
from workspace import make_workspace, save_model, write_jsonl

OWNER = """
output: {folder}/made
model: {{base: {folder}/model, dtype: float32, device: cpu}}
emulate:
  calibration: {folder}/text.jsonl
  calibration_blocks: 6
  block_tokens: 24
  adapters: [0, -1]
  probe_examples: 2
  token_budget: 96
"""
TUNER = RECIPE.replace("{folder}/model", "{folder}/made/package").replace(
    "adapter: {{rank: 2, alpha: 4.0, modules: [q_proj, v_proj]}}\n", ""
)


def owner_recipe(folder: Path, more: str = "") -> Path:
    """Fill a folder with a model of four layers, text and the owner's recipe; return its path."""
    make_workspace(folder)
    save_model(folder / "model", n_layers=4)
    words = ("cow", "owl", "cat", "dog")
    rows = [{"text": f"paragraph {k}: the {words[k % 4]} sees {k * k} stars"} for k in range(40)]
    write_jsonl(folder / "text.jsonl", rows)
    path = folder / "owner.yaml"
    path.write_text(OWNER.format(folder=folder) + more, encoding="utf-8")
    return path


def tuner_recipe(folder: Path, more: str = "") -> Path:
    """Write the data owner's recipe for the package that the owner's recipe makes."""
    path = folder / "tuner.yaml"
    path.write_text(TUNER.format(folder=folder) + more, encoding="utf-8")
    return path
