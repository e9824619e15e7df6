"""What users get wrong: a clear message, the right exit code, no traceback, and nothing lost."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from selectune.cli import main
from selectune.files import CRASH_AT
from small_run import small_recipe
from warm import WarmCli
from workspace import save_model, write_jsonl

GOOD = {"prompt": "Question: 1 + 1?\nAnswer:", "completion": " 2"}
LONG = [{"prompt": f"{n} " * 200, "completion": " x"} for n in range(10, 40)]

Change = Callable[[Path], object]
Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def cli() -> Iterator[WarmCli]:
    with WarmCli() as warm:
        yield warm


@pytest.fixture(autouse=True, scope="module")
def _quiet_libraries() -> Iterator[None]:
    # `main` asks for it by the environment, which is too late where they are imported already.
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_recipe(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(folder: Path, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Return a function that runs a verb, which has to be refused, and gives the message."""

    def run(code: int, *overrides: str, verb: str = "run", recipe: str = "recipe.yaml") -> str:
        assert main([verb, str(folder / recipe), *overrides]) == code
        out, err = capfd.readouterr()
        assert out == ""
        check_message(err)
        return err

    return run


def check_message(err: str) -> None:
    """What is wrong, where it is, and what to do about it, in a few lines."""
    assert err.split(": ")[0].endswith("Error")
    assert "\n  where: " in err
    assert "\n  do:    " in err
    assert "Traceback" not in err
    assert "please report it" not in err
    assert "\\n" not in err
    assert err.count("\n") < 12


def data_file(name: str, content: str | bytes | Sequence[dict[str, Any]]) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            write_jsonl(path, content)

    return change


@pytest.mark.parametrize("name", ["pool", "target", "heldout"])
def test_an_empty_file_is_named(name: str, folder: Path, refuse: Refuse) -> None:
    data_file(f"{name}.jsonl", "\n")(folder)
    message = refuse(1)
    assert f"the {name} has no rows" in message
    assert f"{name}.jsonl" in message


BAD_ROWS = {
    "malformed": (b'{"prompt": "a", "completion": }', "malformed JSON"),
    "cut off": (b'{"prompt": "a", "comple', "malformed JSON"),
    "not UTF-8": (b'{"prompt": "a", "completion": "\xff"}', "not UTF-8"),
    "no object": (b'["a", "b"]', "an object with named fields"),
    "no answer": (b'{"prompt": "a"}', "'completion'"),
    "empty answer": (b'{"prompt": "a", "completion": " "}', '"completion" is empty'),
    "a number": (b'{"prompt": "a", "completion": 4}', "must be text, found int"),
    "a key twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "there twice"),
    "other options": (b'{"prompt": "a", "completion": " b", "options": [" c"]}', "none of"),
}


@pytest.mark.parametrize("name", ["pool", "target", "heldout"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(
    case: str, name: str, folder: Path, refuse: Refuse
) -> None:
    bad, words = BAD_ROWS[case]
    good = json.dumps(GOOD).encode()
    data_file(f"{name}.jsonl", b"\n".join([good, b"", good, bad, good]))(folder)
    message = refuse(1)
    assert words in message
    assert f"where: {name}.jsonl:4" in message


def test_columns_of_no_known_form_are_told_with_the_nearest_names(
    folder: Path, refuse: Refuse
) -> None:
    data_file("pool.jsonl", [{"promt": "a", "completion_": "b"}])(folder)
    message = refuse(1)
    assert "pool.jsonl:1" in message
    assert 'did you mean "prompt"?' in message
    assert 'did you mean "completion"?' in message


def test_a_target_without_answers_is_told(folder: Path, refuse: Refuse) -> None:
    data_file("target.jsonl", [{"prompt": "Question: 1?"}, {"prompt": "Question: 2?"}])(folder)
    message = refuse(1)
    assert "target.jsonl:1" in message
    assert 'add "completion" to every row' in message


@pytest.mark.parametrize("budget", ["100", '"200000 tokens"'])
@pytest.mark.parametrize("verb", ["plan", "select", "run"])
def test_a_pool_smaller_than_the_budget_is_told_before_any_gradient(
    verb: str, budget: str, folder: Path, refuse: Refuse
) -> None:
    assert "the pool is smaller than the budget" in refuse(1, f"select.budget={budget}", verb=verb)
    assert not (folder / "run/store").exists()
    assert not (folder / "run/warmup").exists()


def test_a_share_of_the_pool_that_is_no_example_is_told(folder: Path, refuse: Refuse) -> None:
    data_file("pool.jsonl", [GOOD, {**GOOD, "prompt": "Question: 0 + 2?\nAnswer:"}])(folder)
    assert "a selection needs at least one example" in refuse(1, "select.budget=0.05")


def test_a_length_past_the_context_is_wrong_config(refuse: Refuse) -> None:
    message = refuse(2, "data.max_length=257")
    assert "the model's context is 256" in message
    assert "data.max_length=256" in message


@pytest.mark.parametrize("name", ["pool", "target", "heldout"])
def test_prompts_that_fill_the_context_are_told_before_any_training(
    name: str, folder: Path, refuse: Refuse
) -> None:
    data_file(f"{name}.jsonl", LONG)(folder)
    message = refuse(1)
    assert "30 of 30 examples have no target token within 128 tokens" in message
    assert f"{name}.jsonl:1" in message
    assert not (folder / "run/warmup").exists()


@pytest.mark.parametrize("name", ["pool", "target"])
def test_no_example_left_is_an_error_whatever_share_may_be_lost(
    name: str, folder: Path, refuse: Refuse
) -> None:
    data_file(f"{name}.jsonl", LONG)(folder)
    message = refuse(1, "data.max_empty=1.0")
    assert f"no example of the {name}" in message


def test_a_long_sequence_is_cut_and_counted(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (folder / "pool.jsonl").open("a") as pool:
        pool.write(json.dumps({"prompt": "short", "completion": " long" * 100}) + "\n")
    assert main(["plan", str(folder / "recipe.yaml"), "--json"]) == 0
    assert '"truncated": 1' in capfd.readouterr().out


def test_an_adapter_of_another_base_is_refused(folder: Path, refuse: Refuse) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder / "model")
    config.num_hidden_layers = 3
    wanted = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM(config), wanted).save_pretrained(
        str(folder / "adapter"), save_embedding_layers=False
    )
    message = refuse(1, f"model.adapter={folder / 'adapter'}", "warmup.fraction=0.05")
    assert "made for another base" in message


def test_a_folder_without_an_adapter_is_wrong_config(folder: Path, refuse: Refuse) -> None:
    overrides = (f"model.adapter={folder / 'model'}", "warmup.fraction=0.05")
    assert "no peft adapter" in refuse(2, *overrides)


def spoil_weights(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "the loss of step 1 is nan"),  # in the warm-up
        (("warmup.epochs=0",), "not a number"),  # in the gradient pass
        (("score.method=perplexity",), "scores of perplexity are not a number"),
        (("score.method=length",), "the loss of step 1 is nan"),  # in the selection's arm
    ],
    ids=["warm-up", "gradients", "scores", "tuning"],
)
def test_a_loss_that_is_not_a_number_ends_the_run(
    overrides: tuple[str, ...], words: str, folder: Path, cli: WarmCli
) -> None:
    spoil_weights(folder)
    done = cli("run", folder / "recipe.yaml", *overrides)
    assert (done.code, done.out) == (1, "")
    assert words in done.err
    assert "model.dtype=float32" in done.err
    assert "Traceback" not in done.err
    assert not list((folder / "run").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda f: shutil.rmtree(f / "model"), 2, "no such folder here"),
        (lambda f: (f / "model/config.json").write_text("{"), 2, "not a valid JSON file"),
        (lambda f: os.truncate(f / "model/model.safetensors", 3000), 1, "not fully covered"),
        (lambda f: (f / "model/tokenizer.json").unlink(), 2, "no usable causal LM with tokenizer"),
        (
            lambda f: (f / "model/config.json").write_text(
                (f / "model/config.json").read_text().replace("258", "200")
            ),
            1,
            "another shape than config.json gives it",
        ),
    ],
    ids=["missing", "config", "weights", "tokenizer", "other shapes"],
)
def test_a_damaged_model_is_told(
    change: Change, code: int, words: str, folder: Path, refuse: Refuse
) -> None:
    change(folder)
    assert words in refuse(code)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tune.epoch=4", 'did you mean "epochs"?'),
        ("tuen.epochs=4", 'did you mean "tune"?'),
        ("tune.epochs=four", "tune.epochs"),
        ("tune.epochs=0", "tune.epochs"),
        ("tune.learning_rate=-1", "tune.learning_rate"),
        ("score.method=gits", 'did you mean "gist"?'),
        ("score.options.rnk=2", 'did you mean "rank"?'),
        ("score.options.rank=two", "rank"),
        ("select.budget=1.5", "select.budget"),
        ("data.target={}", "data.target"),
        ("data.heldout={}", "data.heldout"),
        ("data.pool=[]", "data.pool"),
        ("data.heldout={colour: x.jsonl}", 'did you mean "colours"?'),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_read(
    override: str, words: str, folder: Path, refuse: Refuse
) -> None:
    assert words in refuse(2, override)
    assert not (folder / "run/store").exists()


def test_a_missing_recipe_is_told_with_the_nearest_name(refuse: Refuse) -> None:
    assert 'did you mean "recipe.yaml"?' in refuse(2, recipe="recipes.yaml")


def test_a_missing_file_is_told_with_the_nearest_name(folder: Path, refuse: Refuse) -> None:
    (folder / "pool.jsonl").rename(folder / "pools.jsonl")
    assert "pools.jsonl" in refuse(1)


@pytest.mark.parametrize("output", ["file", "file/run"])
def test_a_file_in_the_place_of_the_output_is_told(
    output: str, folder: Path, refuse: Refuse
) -> None:
    (folder / "file").write_text("mine")
    message = refuse(1, f"output={folder / output}")
    assert "a part of the path is a file" in message
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied")]
)
def test_an_output_that_cannot_be_written_is_told(
    number: int, words: str, folder: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, and a read-only mount needs rights: the system's answer is faked.
    def refuse_folder(path: str, *rest: object, **more: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "mkdir", refuse_folder)
    message = refuse(1)
    assert words in message
    assert "output folder" in message


@pytest.mark.parametrize("max_bytes", [1500, 6000, 12000, 20000])
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    max_bytes: int, folder: Path, cli: WarmCli
) -> None:
    # Whoever writes when the room is used up: peft, torch, we ourselves.
    full = cli("run", folder / "recipe.yaml", max_bytes=max_bytes)
    assert (full.code, full.out) == (1, "")
    assert full.err.startswith("StorageError: cannot write ")
    assert "free some space" in full.err
    check_message(full.err)
    assert cli("run", folder / "recipe.yaml").code == 0
    assert cli("verify", folder / "run").code == 0
    assert not [p for p in (folder / "run").rglob(".*") if p.name != ".lock"]


def test_ctrl_c_between_two_steps_says_how_to_go_on(folder: Path, cli: WarmCli) -> None:
    done = cli("select", folder / "recipe.yaml", env={CRASH_AT: "scores.done:1:INT"})
    assert (done.code, done.out) == (130, "")
    assert done.err == "interrupted; the same command goes on where this one stopped\n"
    assert (folder / "run/scores.parquet").exists()


def test_bad_input_in_the_middle_of_a_run_loses_nothing(folder: Path, cli: WarmCli) -> None:
    recipe = folder / "recipe.yaml"
    assert cli("select", recipe).code == 0
    before = {p: p.stat().st_mtime_ns for p in (folder / "run/store").rglob("*")}
    sound = (folder / "pool.jsonl").read_text()
    (folder / "pool.jsonl").write_text(sound + "{")
    assert "pool.jsonl:61" in cli("run", recipe).err
    (folder / "pool.jsonl").write_text(sound.replace("Question", "question", 1))
    changed = cli("run", recipe)
    assert changed.code == 1
    assert changed.err.startswith("IncompatibleRunError")
    save_model(folder / "model", seed=1)
    (folder / "pool.jsonl").write_text(sound)
    other_base = cli("run", recipe)
    assert other_base.code == 1
    assert other_base.err.startswith("IncompatibleRunError")
    save_model(folder / "model")
    assert cli("run", recipe).code == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "run/store").rglob("*")} == before


def test_the_verbs_one_by_one_equal_the_whole_run(folder: Path, cli: WarmCli) -> None:
    recipe = folder / "recipe.yaml"
    for verb in ("plan", "score", "select", "report", "tune", "report", "evaluate", "report"):
        done = cli(verb, recipe)
        assert (done.code, done.err) == (0, ""), verb
        assert done.out
    one_by_one = {n: (folder / "run" / n).read_bytes() for n in ("metrics.jsonl", "selected.jsonl")}
    shutil.rmtree(folder / "run")
    assert cli("run", recipe).code == 0
    assert {n: (folder / "run" / n).read_bytes() for n in one_by_one} == one_by_one
