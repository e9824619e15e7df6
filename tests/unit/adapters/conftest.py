from pathlib import Path

import pytest

from selectune.models import Base, load_base
from selectune.recipe import AdapterSection, ModelSection
from workspace import save_model


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """Load a random two-layer Llama from a folder."""
    if not (tmp_path / "model").exists():
        save_model(tmp_path / "model")
    section = ModelSection(base=str(tmp_path / "model"), dtype="float32", device="cpu")
    return load_base(section, adapter=AdapterSection())
