"""The owner's page of an emulator says what is on record, and stays with the owner."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import LlamaConfig, LlamaForCausalLM

from selectune.cli import main
from selectune.data import read_examples
from selectune.errors import ConfigError, IncompatibleRunError
from selectune.evaluation import Metric
from selectune.files import open_dir, staged
from selectune.offsite.emulate import OWNER, PACKAGE, Emulated, emulate
from selectune.offsite.package import OWNER_KIND
from selectune.offsite.table import Offsite, offsite_table
from selectune.pipeline.emulator_story import write_page, write_pages
from selectune.report.emulator import render
from selectune.report.emulator_facts import CHANNELS, Cut, EmulatorFacts
from selectune.report.emulator_map import layers_in_words
from selectune.report.emulator_scores import scores
from selectune.report.maps import Ramp
from selectune.report.scatter import Across, Point, scatter
from unit.offsite.test_table import answers
from unit.report.browser import Browser, find_chromium
from unit.report.samples import SCRIPT
from unit.report.test_page import Page
from unit.report.test_weights import read_back
from workspace import byte_tokenizer

ROOT = Path(__file__).parents[3]
TEXTS = [f"paragraph {k}: the owl sees {k * k} stars" for k in range(30)]
QUESTION = {"prompt": "What flies?", "completion": " owls", "options": [" owls", " cows"]}
METHODS: dict[str, dict[str, Any]] = {
    "gradot": {"compressor": "gradot", "heal_steps": 2},
    "lambda": {"compressor": "gradot", "options": {"lambda_mlp": 5.0, "lambda_attention": 5.0}},
    "global": {"compressor": "gradot", "budget": "global"},
    "only_mlp": {"compressor": "svd_magnitude", "keep_attention": 1.0},
    "only_attention": {"compressor": "svd_magnitude", "keep_mlp": 1.0},
    "layer_drop": {"compressor": "layer_drop"},
    "crash": {"compressor": "crash"},
}
CUT = ("gradot", "lambda", "global", "only_mlp", "only_attention")


def small_model(seed: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def made(out: Path, seed: int = 3, **how: Any) -> Emulated:  # noqa: ANN401
    return emulate(
        small_model(seed), TEXTS, out, tokenizer=byte_tokenizer(), adapters=[0, -1],
        calibration_blocks=5, block_tokens=24, probe_examples=2, token_budget=72, **how,
    )  # fmt: skip


@pytest.fixture(scope="session")
def emulators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one emulator of each kind."""
    folder = tmp_path_factory.mktemp("emulators")
    asked = {"owls & cows": tuple(read_examples([QUESTION] * 2))}
    for name, how in METHODS.items():
        made(folder / name, **how, questions=asked)
    return folder


@pytest.fixture
def record(emulators: Path) -> Callable[[str], dict[str, Any]]:
    """Return what is on record of an emulator, by its name."""
    return lambda name: json.loads((emulators / name / OWNER / "owner.json").read_bytes())


@pytest.fixture
def page(emulators: Path) -> Callable[[str], str]:
    """Return the page that `emulate` wrote, by the emulator's name."""
    return lambda name: (emulators / name / OWNER / "report.html").read_text("utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_the_page_is_whole_acts_on_nothing_and_has_no_number_that_is_none(
    name: str, page: Callable[[str], str]
) -> None:
    source = page(name)
    found = Page(source)
    assert found.is_balanced
    ids = found.all("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in found.all("href") if link.startswith("#")} <= set(ids)
    assert all(link.startswith(("#", "data:,")) for link in found.all("href"))
    assert not {tag for tag, _ in found.elements} & {"script", "iframe", "img", "form", "object"}
    assert not {a for _, own in found.elements for a in own if a.startswith("on") or a == "style"}
    written = [found.text, *(value for _, own in found.elements for value in own.values())]
    assert not re.search(r"\b(nan|inf|None|not a number)\b", " ".join(written))
    named = re.findall(r'<svg[^>]*role="img"[^>]*>(.{7})', source)
    assert set(named) == {"<title>"}


def cells_of(source: str) -> list[list[str]]:
    """Return the table of all layers, its headings first."""
    body = source.split("Layer by layer, in numbers")[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("<tr>")]
    return [[re.sub(r"<span.*", "", cell) for cell in row] for row in rows if row]


@pytest.mark.parametrize("name", CUT)
def test_kept_counts_are_those_on_record(
    name: str, page: Callable[[str], str], record: Callable[[str], dict[str, Any]]
) -> None:
    head, *rows = cells_of(page(name))
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert {rows[0][1], rows[5][1]} == {"whole, to be tuned"}
    seen = 0
    for layer in record(name)["about"]["layers"]:
        row = dict(zip(head, rows[layer["original"]], strict=True))
        parts = {key.rpartition(".")[2]: one for key, one in layer["matrices"].items()}
        if layer["channels"] is not None:
            parts[CHANNELS] = layer["channels"]
        for key, one in parts.items():
            n, kept = len(one["scores"]), one["kept"]
            assert row[key] == ("whole" if kept is None else f"{len(kept)} of {n}")
            seen += kept is not None
    assert seen
    if name == "gradot":
        assert head == ["Layer", "What", "q_proj", "k_proj", "v_proj", "o_proj", "MLP"]


@pytest.mark.parametrize("name", METHODS)
def test_the_map_is_coloured_by_what_is_kept(
    name: str, page: Callable[[str], str], record: Callable[[str], dict[str, Any]]
) -> None:
    facts = EmulatorFacts.of(record(name))
    drawing = re.findall(r"<svg[^>]*class=\"cells\".*?</svg>", page(name))[0]
    n_rows = int(re.findall(r'viewBox="0 0 6 (\d+)"', drawing)[0])
    shares = read_back(drawing, "rising", (n_rows, 6))
    trains, shared = (read_back(drawing, kind, (n_rows, 6)) == 0 for kind in ("trains", "shared"))
    ramp = Ramp(0.0, 1.0)
    for j in range(6):
        fate = facts.fate(j)
        assert trains[:, j].all() == trains[:, j].any() == (fate == "adapter")
        assert shared[:, j].all() == shared[:, j].any() == (fate == "shared")
        if fate in ("adapter", "shared", "gone"):
            assert set(shares[:, j]) == {-1}
            continue
        kept = [cut.share for cut in facts.cuts.get(j, ())] or [1.0]
        kept = [1.0] * (n_rows - len(kept)) + kept  # attention that was left alone stands first
        assert shares[:, j].tolist() == ramp(np.array([kept]))[0].tolist()


def test_shares_are_of_numbers_not_of_ranks(record: Callable[[str], dict[str, Any]]) -> None:
    cut = EmulatorFacts.of(record("gradot")).cuts[1][1]
    assert (cut.name, cut.n, cut.n_kept) == ("self_attn.k_proj", 16, 6)  # [16, 32]
    assert cut.share == pytest.approx(6 * (16 + 32) / (16 * 32))


@pytest.mark.parametrize("name", CUT)
def test_dots_are_the_components_that_are_kept_and_that_are_not(
    name: str, page: Callable[[str], str], record: Callable[[str], dict[str, Any]]
) -> None:
    source = page(name)
    for layer in record(name)["about"]["layers"]:
        for key, one in layer["matrices"].items():
            what = f"layer {layer['original']}, {key.rpartition('.')[2]}: "
            drawings = re.findall(rf'<title>{what}[^<]*</title>.*?class="dots selected"', source)
            assert len(drawings) == 2  # singular values, scores
            n = len(one["scores"])
            kept = range(n) if one["kept"] is None else one["kept"]
            for drawing in drawings:
                left, stayed = re.findall(r'<path d="([^"]*)"', drawing)
                xs = [float(x) for x in re.findall(r"M([\d.]+) ", stayed)]
                assert xs == pytest.approx([1000 * (i + 0.5) / n for i in kept], abs=0.01)
                assert left.count("h0") == n - len(xs)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gradot", "Layers 0 and 5 go out whole, the other 4 at "),
        (
            "layer_drop",
            "Layers 0 and 5 go out whole; of the other 4, 2 stay and 2 are left out: 50",
        ),
        ("crash", "of the other 4, 2 stay and 2 run the weights of one of these: 50.0"),
    ],
)
def test_the_first_sentence_says_what_goes_out(
    name: str, words: str, page: Callable[[str], str], record: Callable[[str], dict[str, Any]],
    emulators: Path,
) -> None:  # fmt: skip
    text = Page(page(name)).text
    assert words in text
    quality = record(name)["about"]["quality"]
    assert f"{100 * quality['ratios']['middle']:.1f}\u202f% of their parameters" in text
    assert f"a cosine of {quality['gradients']['cosine']:.3f} with".replace("-", "−") in text
    assert f"has a loss of {quality['losses_nats']['emulator']:.2f} nats" in text
    assert "of owls & cows right, the model" in text
    files = [p for p in (emulators / name / PACKAGE).rglob("*") if p.is_file()]
    assert f"The package takes {sum(p.stat().st_size for p in files) / 1000:.0f} kB" in text


def test_a_shared_layer_is_named_with_the_one_that_it_runs(
    page: Callable[[str], str], record: Callable[[str], dict[str, Any]]
) -> None:
    found = record("crash")
    pairs = zip(found["positions"], found["sources"], strict=True)
    shared = {j: source for j, source in pairs if j != source}
    rows = cells_of(page("crash"))[1:]
    assert {int(row[0]): row[1] for row in rows if "runs" in row[1]} == {
        j: f"runs the weights of {source}" for j, source in shared.items()
    }
    assert f"{min(shared.values())} in place of {min(shared)}" in page("crash")
    assert [row[1] for row in cells_of(page("layer_drop"))[1:]].count("left out") == 2


def test_every_layer_that_trains_has_its_cosine_and_its_error(
    page: Callable[[str], str], record: Callable[[str], dict[str, Any]]
) -> None:
    source = page("gradot").split('id="gradients"')[1]
    by_layer = record("gradot")["about"]["quality"]["gradients"]["by_layer"]
    assert list(by_layer) == ["0", "5"]
    for j, one in by_layer.items():
        for value in one.values():
            assert f"<title>layer {j}: {value:.3f}</title>".replace("-", "−") in source


@pytest.mark.parametrize(
    ("losses", "healed", "error", "words"),
    [
        ((4.0, 3.0), None, 0.5, []),
        ((3.0, 3.0), None, 0.5, ["no worse than the model"]),
        ((4.0, 3.0), 2.9, 0.5, ["After a little training"]),
        ((4.0, 3.0), 3.1, 1.0, ["The error of the gradients"]),
    ],
    ids=["well", "too good", "healed", "untrue"],
)
def test_an_owner_is_warned_of_what_the_numbers_mean(
    losses: tuple[float, float], healed: float | None, error: float, words: list[str],
    record: Callable[[str], dict[str, Any]],
) -> None:  # fmt: skip
    found = record("gradot")
    quality = found["about"]["quality"]
    quality["losses_nats"] = dict(zip(("emulator", "original"), losses, strict=True))
    quality["healed_loss_nats"], quality["gradients"]["relative_error"] = healed, error
    text = Page(render(EmulatorFacts.of(found))).text
    every = ["no worse than the model", "After a little training", "The error of the gradients"]
    assert [w for w in every if w in text] == words
    assert ("Beware" in text) == bool(words)


def test_whatever_the_record_holds_is_text(record: Callable[[str], dict[str, Any]]) -> None:
    found = record("gradot")
    about = found["about"]
    about |= {"method": SCRIPT, "options": {SCRIPT: SCRIPT}, "budget": SCRIPT}
    about["quality"]["answers"] = {SCRIPT: about["quality"]["answers"]["owls & cows"]}
    found["package"] = SCRIPT
    for layer in about["layers"]:
        layer["matrices"][f"x.{SCRIPT}"] = layer["matrices"].pop("self_attn.q_proj")
    source = render(EmulatorFacts.of(found))
    assert SCRIPT not in source.split("</style>")[1]
    text = Page(source).text
    assert Page(source).is_balanced
    assert SCRIPT in text


def test_the_page_stays_with_the_owner_and_comes_back_when_it_is_lost(tmp_path: Path) -> None:
    made(tmp_path)
    path = tmp_path / OWNER / "report.html"
    before = path.read_bytes()
    assert [p.parent.name for p in tmp_path.rglob("*.html")] == [OWNER]
    path.unlink()  # as where a run was killed after its folders were written
    again = made(tmp_path)
    assert path.read_bytes() == before
    assert again.text == ["finished before"]
    shutil.rmtree(tmp_path / PACKAGE)
    assert "The package takes" not in write_page(tmp_path / OWNER, tmp_path / PACKAGE).read_text()


def test_the_part_of_the_limitations_that_the_page_names_is_there(
    page: Callable[[str], str],
) -> None:
    heading = "What offsite tuning protects, and what it does not"
    assert f"\n## {heading}\n" in (ROOT / "LIMITATIONS.md").read_text("utf-8")
    assert heading in Page(page("layer_drop")).text


def cut_of(values: np.ndarray, spectrum: np.ndarray | None, kept: list[int] | None) -> Cut:
    is_kept = np.full(len(values), kept is None)
    is_kept[kept or []] = True
    return Cut(
        name="x" if spectrum is not None else CHANNELS, is_kept=is_kept, scores=values,
        spectrum=spectrum, size=0.1, n_protected=min(1, len(values)), is_whole=kept is None,
    )  # fmt: skip


NUMBERS = st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1e-30, 1e30])


@given(st.data())
def test_any_scores_can_be_drawn(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200))
    values = data.draw(hnp.arrays(np.float64, n, elements=NUMBERS))
    spectrum = np.sort(np.abs(data.draw(hnp.arrays(np.float64, n, elements=NUMBERS))))[::-1]
    kept = data.draw(st.none() | st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    facts = EmulatorFacts(
        n_layers=3, adapters=(0, 2), sources={0: 0, 1: 1, 2: 2}, about={}, quality={},
        cuts={1: [cut_of(values, spectrum, kept), cut_of(values, None, kept)]},
        package="", package_bytes=None,
    )  # fmt: skip
    drawn = scores(facts) or ""
    assert not re.search(r"\b(nan|inf)\b", drawn)
    for svg in re.findall(r'<svg[^>]*role="img".*?</figure>', drawn):
        height = float(re.findall(r'height="([\d.]+)"', svg)[0])
        for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", svg):
            assert -0.01 <= float(y) <= height


@pytest.mark.parametrize(
    ("layers", "words"),
    [([3], "3"), ([0, 1, 28, 29], "0, 1, 28 and 29"), ([0, 1, 2, 9], "0 to 2 and 9"),
     ([*range(5)], "0 to 4")],
)  # fmt: skip
def test_layers_are_named_as_people_name_them(layers: list[int], words: str) -> None:
    assert layers_in_words(layers) == words


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(-1, 1)), min_size=1, max_size=8))
def test_the_coloured_emulators_are_those_that_none_beats(pairs: list[tuple[float, float]]) -> None:
    points = [
        Point(number=k, label=f"e{k}", x=x, y=y)
        for k, (x, y) in enumerate(pairs)
    ]  # fmt: skip
    drawn = scatter(points, "Cosine", Across("its own loss", "→", mark=(3.0, "the model")))
    is_best = [
        not any(a >= x and b >= y and (a, b) != (x, y) for a, b in pairs) for x, y in pairs
    ]  # fmt: skip
    names = re.findall(r'class="dot (\w+)"', drawn)
    assert [name == "selected" for name in names] == is_best
    assert "nan" not in drawn
    [drawing] = re.findall(r"<svg[^>]*airy.*?</svg>", drawn)
    for circle in ET.fromstring(drawing).iter("circle"):  # noqa: S314 (our own text)
        assert 0 <= float(circle.get("cx", "").rstrip("%")) <= 100
        assert 0 <= float(circle.get("cy", "")) <= 300


@pytest.fixture
def several(emulators: Path, tmp_path: Path) -> Path:
    """Return a folder with the owner's parts of two emulators of one model."""
    for name in ("gradot", "crash"):
        shutil.copytree(emulators / name / OWNER, tmp_path / name / OWNER)
    return tmp_path


def test_several_emulators_of_one_model_get_a_page_together(
    several: Path, record: Callable[[str], dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(several), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["reports"]
    assert told[-1] == str(several / "report.html")
    text = Page((several / "report.html").read_text("utf-8")).text
    assert "2 emulators of one model" in text
    for name in ("crash", "gradot"):
        quality = record(name)["about"]["quality"]
        assert f"{quality['gradients']['cosine']:.3f}".replace("-", "−") in text
        assert f"{quality['losses_nats']['emulator']:.2f}" in text
    assert main(["report", str(several / "crash")]) == 0
    assert capfd.readouterr().out == f"report: {several / 'crash' / OWNER / 'report.html'}\n"


@pytest.mark.parametrize("metric", ["correct_norm", "answer_loss"])
def test_what_tuning_won_stands_beside_what_was_given_away(metric: Metric, several: Path) -> None:
    cells = {
        (name, seed): Offsite(answers(seed, 0.2), answers(seed, 0.4), answers(seed, share))
        for name, share in (("gradot", 0.9), ("crash", 0.5))
        for seed in (0, 1)
    }
    table = offsite_table(cells, answers(0, 0.3), metric=metric, n_boot=100)
    text = Page(write_pages(several, OWNER, PACKAGE, table)[-1].read_text("utf-8")).text
    assert "What tuning on them won" in text
    assert "2 seeds" in text
    best = table.rows[0]
    assert best.task == "all"
    digits = 1 if metric == "correct_norm" else 3
    assert f"{best.pi:.{digits}f}" in text
    assert f"{best.delta.mean_difference:+.{digits}f}".replace("-", "−") in text
    assert "nan" not in text


def test_a_table_of_other_emulators_is_refused(several: Path) -> None:
    cells = {("somebody", 0): Offsite(answers(0, 0.2), answers(0, 0.4), answers(0, 0.9))}
    table = offsite_table(cells, answers(0, 0.3), n_boot=100)
    with pytest.raises(ConfigError, match="names no emulator of this folder") as caught:
        write_pages(several, OWNER, PACKAGE, table)
    assert "it has somebody, the folder crash and gradot" in str(caught.value)


def test_a_record_that_says_too_little_is_refused(several: Path) -> None:
    """As of a package that was saved by hand."""
    folder = several / "gradot" / OWNER
    opened = open_dir(folder, kind=OWNER_KIND)
    record = opened.read_json("owner.json")
    del record["about"]["quality"]
    with staged(folder, kind=OWNER_KIND, meta=dict(opened.meta)) as stage:
        stage.write_json("owner.json", record)
    with pytest.raises(ConfigError, match="does not say: quality"):
        write_pages(several / "gradot", OWNER, PACKAGE)


def test_emulators_of_other_models_or_probes_are_not_compared(
    several: Path, emulators: Path, tmp_path: Path
) -> None:
    made(several / "other", seed=4)
    with pytest.raises(IncompatibleRunError, match="of different models"):
        write_pages(several, OWNER, PACKAGE)
    shutil.rmtree(several / "other")
    made(several / "other")  # the same model, without questions
    with pytest.raises(IncompatibleRunError, match="the probes differ"):
        write_pages(several, OWNER, PACKAGE)


def test_a_folder_without_emulators_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no emulator"):
        write_pages(tmp_path, OWNER, PACKAGE)


def test_equal_facts_give_equal_pages(record: Callable[[str], dict[str, Any]]) -> None:
    found = record("global")
    assert render(EmulatorFacts.of(found)) == render(EmulatorFacts.of(deepcopy(found)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no chromium on the PATH")
    with Browser(binary, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("name", ["gradot", "layer_drop", "crash", "all"])
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits_the_screen(
    name: str, width: int, emulators: Path, several: Path, browser: Browser
) -> None:
    path = emulators / name / OWNER / "report.html"
    if name == "all":
        path = write_pages(several, OWNER, PACKAGE)[-1]
    visit = browser.visit(path.as_uri(), width=width, dark=width < 400)
    assert [r for r in visit.requests if not r.startswith("data:")] == [path.as_uri()]
    assert visit.complaints == []
    assert visit.scroll_width <= width
