from collections.abc import Callable
from pathlib import Path

import pytest

from crash.scenario import PAYLOAD_BYTES, observe, scenario, tree


@pytest.mark.parametrize("max_bytes", [1, 20, 60, 500, PAYLOAD_BYTES - 1])
def test_a_disk_that_takes_no_more_bytes_keeps_the_older_result_and_says_so(
    max_bytes: int, child: Callable[..., dict], fast_dir: Path, undisturbed: dict[str, bytes]
) -> None:
    root = fast_dir / "root"
    scenario(root, 1)
    done = child(root, 2, max_bytes=max_bytes)
    assert done["code"] == 1, done["message"]
    assert done["message"].startswith("StorageError")
    assert "EFBIG" in done["message"]
    assert observe(root)[0] == 1
    assert child(root, 2)["code"] == 0
    assert tree(root) == undisturbed
