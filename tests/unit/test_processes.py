"""Which of several processes this is, how they share a folder, and what is refused."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from selectune.errors import ConfigError, StorageError
from selectune.files import Crew, lock, share
from selectune.pipeline.processes import Launch, Part, read_part, take_gpu, take_launch
from small_run import small_recipe
from warm import Done, WarmCli

LAUNCHED = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29",
    "TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no",
}  # fmt: skip
# A pass at each of two checkpoints.
LESS = ("score.method=less", "warmup.schedule_epochs=2")


def test_a_launch_is_read_once_and_leaves_nothing_that_a_trainer_would_wait_for() -> None:
    environment = {**LAUNCHED, "OMP_NUM_THREADS": "1"}
    launch = take_launch(environment)
    assert launch == Launch(1, 2, 1, "launch here:29 of 2")
    assert not launch.is_leader
    assert environment == {"OMP_NUM_THREADS": "1"}
    assert take_launch(environment) is None
    assert take_launch({**LAUNCHED, "RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize("wrong", [{"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "two"}])
def test_a_launch_that_cannot_be_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        take_launch({**LAUNCHED, **wrong})


def test_each_process_of_a_machine_keeps_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    take_gpu(Launch(3, 4, 3, ""))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


@pytest.mark.parametrize("text", ["0/4", "5/4", "a/b", "1/", "1", "1/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no shard"):
        read_part(text, None)


def test_a_shard_is_counted_from_one() -> None:
    assert read_part("1/4", None) == Part(0, 4)
    assert read_part("4/4", None) == Part(3, 4)
    assert read_part("", None) is None


def test_what_several_processes_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="being changed"):
        read_part("1/4", None, allow="seed")
    with pytest.raises(ConfigError, match="under torchrun"):
        read_part("1/4", Launch(0, 2, 0, "launch"))


def test_a_folder_is_one_writer_s_or_several_helpers(tmp_path: Path) -> None:
    with share(tmp_path) as one, share(tmp_path) as other:
        assert (one, other) == (True, True)
        with pytest.raises(StorageError, match="in use"), lock(tmp_path):
            pass
    with lock(tmp_path), pytest.raises(StorageError, match="in use"), share(tmp_path):
        pass


def test_who_comes_when_the_leader_of_its_launch_is_alone_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selectune.files.rundir._SIGNING_SECONDS", 0.0)
    with lock(tmp_path, waits=True, launch="launch a:1 of 2"):
        with share(tmp_path, launch="launch a:1 of 2") as is_held:
            assert not is_held
        with (
            pytest.raises(StorageError, match="in use"),
            share(tmp_path, launch="launch b:1 of 2"),
        ):
            pass


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("selectune.files.claims.fcntl.lockf", refuse)


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_each_shard_has_its_fixed_parts(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="knows no locks"):
        Crew(tmp_path / ".claims", index=0, n=2, is_fixed=False, waits=True)
    taken: list[list[int]] = []
    for index in (0, 1):
        crew = Crew(tmp_path / ".claims", index=index, n=2, is_fixed=True, waits=False)
        with ExitStack() as stack:
            taken.append([k for k in range(5) if stack.enter_context(crew.claim(f"s{k}", k))])
        with crew.turn("targets", lambda: True):
            pass
        if index == 1:
            with pytest.raises(StorageError, match="targets"), crew.turn("targets", lambda: False):
                pass
        crew.close()
    assert taken == [[0, 2, 4], [1, 3]]


@pytest.fixture(scope="module")
def clis() -> Iterator[tuple[WarmCli, WarmCli]]:
    with WarmCli() as one, WarmCli() as other:
        yield one, other


@pytest.fixture(scope="module")
def alone(clis: tuple[WarmCli, WarmCli], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert clis[0]("score", small_recipe(folder)).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def alone_at_checkpoints(
    clis: tuple[WarmCli, WarmCli], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("alone-at-checkpoints")
    assert clis[0]("score", small_recipe(folder), *LESS).code == 0
    return folder / "run"


def scored(run: Path) -> dict[str, bytes]:
    """Return scores and stores, file by file."""
    files = [run / "scores.parquet", *sorted(run.glob("store*/**/*"))]
    return {str(f.relative_to(run)): f.read_bytes() for f in files if f.is_file()}


def test_shards_in_any_order_and_then_all_are_one_run(
    clis: tuple[WarmCli, WarmCli], alone: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path)
    for text in ("2/2", "1/2"):
        done = clis[0]("score", recipe, "--shard", text)
        assert (done.code, done.err) == (0, "")
        assert f"shard {text}" in done.out
    merged = clis[0]("score", recipe)
    assert (merged.code, merged.err) == (0, "")
    assert merged.passes.get("store.shard_done", 0) == 0
    assert scored(tmp_path / "run") == scored(alone)
    assert len(list((tmp_path / "run").glob("store.*-of-2.cost.json"))) == 2


def test_a_launch_scores_together_and_its_leader_goes_on_alone(
    clis: tuple[WarmCli, WarmCli], alone: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path)

    def start(rank: int) -> Done:
        env = {**LAUNCHED, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return clis[rank]("select", recipe, env=env)

    with ThreadPoolExecutor(2) as threads:
        leader, helper = threads.map(start, range(2))
    assert (leader.code, leader.err, helper.code, helper.err) == (0, "", 0, "")
    assert "examples chosen" in leader.out
    assert helper.out == ""
    n_shards = len(list((tmp_path / "run/store").glob("shard-*")))
    computed = [one.passes.get("store.shard_done", 0) for one in (leader, helper)]
    assert sum(computed) == n_shards
    assert scored(tmp_path / "run") == scored(alone)
    assert not list((tmp_path / "run").rglob("*.staging-*"))


def test_shards_of_passes_at_checkpoints_are_one_run(
    clis: tuple[WarmCli, WarmCli], alone_at_checkpoints: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path)
    computed: list[int] = []
    for text in ("2/2", "1/2"):
        done = clis[0]("score", recipe, *LESS, "--shard", text)
        assert (done.code, done.err) == (0, "")
        computed.append(done.passes["store.shard_done"])
    shards = list((tmp_path / "run").glob("store-*/shard-*"))
    assert len(shards) % 2 == 0  # as many at both checkpoints
    assert sorted(computed) == [len(shards) // 4 * 2, len(shards) - len(shards) // 4 * 2]
    merged = clis[0]("score", recipe, *LESS)
    assert (merged.code, merged.err) == (0, "")
    assert merged.passes.get("store.shard_done", 0) == 0
    assert {name.split("/")[0] for name in scored(alone_at_checkpoints)} == {
        "scores.parquet", "store-1-release", "store-2-release",
    }  # fmt: skip
    assert scored(tmp_path / "run") == scored(alone_at_checkpoints)
    assert len(list((tmp_path / "run").glob("store-*.*-of-2.cost.json"))) == 4


def test_a_launch_shares_passes_at_checkpoints(
    clis: tuple[WarmCli, WarmCli], alone_at_checkpoints: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path)

    def start(rank: int) -> Done:
        env = {**LAUNCHED, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return clis[rank]("score", recipe, *LESS, env=env)

    with ThreadPoolExecutor(2) as threads:
        leader, helper = threads.map(start, range(2))
    assert (leader.code, leader.err, helper.code, helper.err) == (0, "", 0, "")
    assert "examples scored by less" in leader.out
    assert helper.out == ""
    n_shards = len(list((tmp_path / "run").glob("store-*/shard-*")))
    computed = [one.passes.get("store.shard_done", 0) for one in (leader, helper)]
    assert sum(computed) == n_shards
    assert scored(tmp_path / "run") == scored(alone_at_checkpoints)
    assert not list((tmp_path / "run").rglob("*.staging-*"))


LAUNCHERS = {
    # accelerate starts one process on CPUs, whatever it is told: docs/processes.md.
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 3",
    "accelerate": "accelerate.commands.launch --cpu --num_processes 3 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_processes_that_score_as_one(
    alone: Path, tmp_path: Path, launcher: str
) -> None:
    launch = [sys.executable, "-m", *LAUNCHERS[launcher].split()]
    command = ["-m", "selectune", "score", str(small_recipe(tmp_path))]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples scored by gist") == 1  # by rank 0 alone
    assert scored(tmp_path / "run") == scored(alone)
    assert not list((tmp_path / "run").rglob("*.staging-*"))


def test_wrong_shards_end_with_words(clis: tuple[WarmCli, WarmCli], alone: Path) -> None:
    recipe = alone.parent / "recipe.yaml"
    no_passes = clis[0]("score", recipe, "score.method=random", "--shard", "1/2")
    assert (no_passes.code, no_passes.out) == (2, "")
    assert "cannot be scored in shards" in no_passes.err
    with lock(alone):
        busy = clis[0]("score", recipe, "--shard", "1/2")
    assert busy.code == 1
    assert "in use by another process" in busy.err
    other = clis[0]("score", recipe, "seed=5", "--shard", "1/2")
    assert "holds a run of another recipe" in other.err


def test_what_one_process_does_is_left_to_the_leader(
    clis: tuple[WarmCli, WarmCli], alone: Path
) -> None:
    run = str(alone)
    ranks = [clis[0]("verify", run, env={**LAUNCHED, "RANK": str(k)}) for k in range(2)]
    assert [one.code for one in ranks] == [0, 0]
    assert "1 more have nothing to do" in ranks[0].err
    assert (ranks[1].out, ranks[1].err) == ("", "")
