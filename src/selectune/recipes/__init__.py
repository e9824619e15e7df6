"""The recipes that ship."""

from pathlib import Path

FOLDER = Path(__file__).parent


def demo_recipe() -> Path:
    """Return the recipe that `selectune demo` runs."""
    return FOLDER / "demo.yaml"
