"""The one writer: stage, fsync, manifest, promote; checksums; kill points.

A result is made and read back, every byte checked, by

    with staged(run / "scores", kind="scores", meta={"method": "gist"}) as stage:
        stage.write_table("scores.parquet", table)
    scores = open_dir(run / "scores", kind="scores")
    scores.read_table("scores.parquet"), scores.meta["method"]

Folders that others write in place get their manifest by `seal`; single files go through
`write_file`.
"""

from selectune.files.claims import CLAIMS, Alone, Crew, Hands
from selectune.files.disk import MANIFEST, sha256_file
from selectune.files.kill import CRASH_AT, KillPoint, kill_point, passes
from selectune.files.opened import Opened, is_complete, open_dir
from selectune.files.rundir import check_free_space, lock, share, sweep
from selectune.files.single import write_file, write_parquet
from selectune.files.stage import StagedDir, refuse_other_result, seal, staged

__all__ = [
    "CLAIMS",
    "CRASH_AT",
    "MANIFEST",
    "Alone",
    "Crew",
    "Hands",
    "KillPoint",
    "Opened",
    "StagedDir",
    "check_free_space",
    "is_complete",
    "kill_point",
    "lock",
    "open_dir",
    "passes",
    "refuse_other_result",
    "seal",
    "sha256_file",
    "share",
    "staged",
    "sweep",
    "write_file",
    "write_parquet",
]
