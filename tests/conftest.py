"""What every test gets: no network, one thread, the same random numbers each time."""

import gc
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

_GUARD = Path(__file__).parent / "guard"
_SOURCE = Path(__file__).parents[1] / "src"
sys.path.insert(0, str(_GUARD))
import sitecustomize as _guard  # noqa: E402  (any other file of that name has run by now)

if Path(_guard.__file__ or "").parent != _GUARD:
    # An interpreter that came with a sitecustomize of its own: load ours beside it.
    sys.modules.pop("sitecustomize")
    import sitecustomize as _guard

# Set before torch, transformers and datasets are imported anywhere, and inherited by children.
os.environ.update(
    PYTHONPATH=os.pathsep.join(
        part for part in (str(_GUARD), str(_SOURCE), os.environ.get("PYTHONPATH", "")) if part
    ),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=tempfile.mkdtemp(prefix="selectune-tests-"),
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    NO_COLOR="1",
    COLUMNS="100",
)

# No wall clock decides a test, and each run draws the same cases.
settings.register_profile("selectune", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("selectune")


def pytest_collection_finish() -> None:
    """Hide from garbage collection what is there by now: modules, and the tests themselves.

    Each training ends in a full collection, by accelerate, which would look through a million of
    objects that never go.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):  # a test without tensors need not wait for its import
        torch.set_num_threads(1)
        torch.manual_seed(0)
