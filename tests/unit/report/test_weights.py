"""What is told of single weights is what was found, and nothing is told where nothing was."""

import dataclasses
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from selectune.report.markup import Markup, tag
from selectune.report.page import _head, _sheet
from selectune.report.weight_density import Places, density, short_names
from selectune.report.weight_facts import (
    ChosenWeights,
    SharedWeights,
    TransferFacts,
    WeightFacts,
    WeightPlane,
)
from selectune.report.weight_marks import cells, fine_percent, outline, power, size_of
from selectune.report.weight_overlap import shared
from selectune.report.weight_plane import medians, plane
from selectune.report.weight_transfer import transfer
from selectune.report.weights import trained
from unit.report.browser import Browser, find_chromium
from unit.report.samples import ARABIC, SCRIPT
from unit.report.test_page import Page
from unit.report.weight_samples import (
    chosen_of,
    plane_facts,
    shared_of,
    transfer_of,
    weight_facts,
)


def read_back(drawn: str, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Read cells back from their strokes, the first row at the top."""
    levels = np.full(shape, -1)
    for path in ET.fromstring(drawn).iter("path"):  # noqa: S314 (our own text)
        name = path.get("class", "")
        if not re.fullmatch(rf"{kind}\d", name):
            continue
        for x, y, width in re.findall(r"M(\d+) ([\d.]+)h(\d+)", path.get("d", "")):
            row, start = int(float(y)), int(x)
            assert (levels[row, start : start + int(width)] == -1).all()  # nothing drawn twice
            levels[row, start : start + int(width)] = int(name[len(kind) :])
    return levels


def drawings(section: str) -> list[str]:
    return re.findall(r"<svg[^>]*class=\"cells\".*?</svg>", section)


def html_of(facts: WeightFacts) -> str:
    style = "".join(_sheet(f"{name}.css") for name in ("style", "layers", "weights"))
    body = tag("body", tag("main", trained(facts)))
    return "<!doctype html>\n" + tag("html", _head("weights", style), body, lang="en")


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "0"), (0.0000314, "0.0031"), (0.0024, "0.24"), (0.0097, "0.97"), (0.00999, "1.0"),
     (0.01, "1.0"), (0.0285, "2.9"), (0.71, "71"),
     (0.996, "99.6"), (0.99999, "99.9"), (1.0, "100")],
)  # fmt: skip
def test_shares_are_written_with_two_digits_that_count(share: float, words: str) -> None:
    assert fine_percent(share).removesuffix("\u202f%") == words


@given(st.floats(1e-7, 1.0))
def test_a_written_share_is_within_its_digits(share: float) -> None:
    assert float(fine_percent(share).split("\u202f")[0]) == pytest.approx(100 * share, rel=0.055)


def test_powers_and_sizes_are_written_as_people_write_them() -> None:
    assert power(-12) == "10⁻¹²"
    assert power(3) == "10³"
    assert size_of(-3.0) == "1.0e−3"
    assert size_of(0.30103) == "2.0e0"


@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7),
                  elements=st.integers(-1, 8)))  # fmt: skip
def test_cells_are_drawn_as_they_are(levels: np.ndarray) -> None:
    drawn = tag("svg", *cells(levels, "rising"))
    np.testing.assert_array_equal(read_back(drawn, "rising", levels.shape), levels)


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)))
def test_the_outline_is_every_edge_between_in_and_out_and_no_other(is_in: np.ndarray) -> None:
    found: set[tuple[str, int, int]] = set()
    path = re.findall(r'd="([^"]*)"', outline(is_in, "bulk"))[0]
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path):
        for k in range(int(length)):
            edge = (way, int(x) + k * (way == "h"), int(y) + k * (way == "v"))
            assert edge not in found
            found.add(edge)
    rows, columns = is_in.shape

    def holds(r: int, c: int) -> bool:
        return 0 <= r < rows and 0 <= c < columns and bool(is_in[r, c])

    expected = {("h", c, r) for r in range(rows + 1) for c in range(columns)
                if holds(r - 1, c) != holds(r, c)}  # fmt: skip
    expected |= {("v", c, r) for r in range(rows) for c in range(columns + 1)
                 if holds(r, c - 1) != holds(r, c)}  # fmt: skip
    assert found == expected


@given(st.lists(st.lists(st.sampled_from(["attn", "mlp", "c_proj", "*", "bias"]), min_size=1,
                         max_size=4).map(".".join), unique=True, max_size=6))  # fmt: skip
def test_short_names_tell_modules_apart(modules: list[str]) -> None:
    names = short_names(modules)
    assert len(set(names.values())) == len(modules)
    for module, name in names.items():
        assert f".{module}".endswith(f".{name}")


def test_short_names_are_short_where_they_can_be() -> None:
    names = short_names(["attn.c_attn", "attn.c_proj", "mlp.c_proj", "attn.c_attn.bias"])
    assert [*names.values()] == ["c_attn", "attn.c_proj", "mlp.c_proj", "c_attn.bias"]


def test_tensors_find_their_layer_and_module_experts_together() -> None:
    eligible = {
        "model.embed_tokens.weight": 100,
        "model.layers.0.mlp.experts.0.up_proj.weight": 10,
        "model.layers.0.mlp.experts.1.up_proj.weight": 10,
        "model.layers.0.norm.weight": 4,
        "model.layers.2.norm.weight": 4,
    }
    chosen = {
        "model.embed_tokens.weight": 50,
        "model.layers.0.mlp.experts.1.up_proj.weight": 3,
        "model.layers.2.norm.weight": 1,
    }
    places = Places.of(ChosenWeights(arm="a", eligible=eligible, chosen=chosen))
    assert places.layers == [0, 2]
    assert places.modules == ["up_proj", "norm"]
    assert places.eligible.tolist() == [[20, 0], [4, 4]]
    assert places.chosen.tolist() == [[3, 0], [0, 1]]
    assert places.outside == [("model.embed_tokens", 100, 50)]


def test_the_map_has_the_colour_of_every_density() -> None:
    facts = chosen_of("a", n_layers=5)
    section = density(facts)
    places = Places.of(facts)
    share = facts.n_chosen / facts.n_eligible
    with np.errstate(divide="ignore"):  # nothing chosen: the lowest colour
        lift = np.log2(places.chosen / places.eligible / share)
    reach = int(re.findall(r"1/(\d+) of it or less", section)[0])
    exponent = round(np.log2(reach))
    assert exponent == min(5, max(1, int(np.ceil(np.abs(lift[np.isfinite(lift)]).max()))))
    above, modules = drawings(section)
    expected = np.clip(np.floor((lift / exponent + 1) / 2 * 9), 0, 8)
    np.testing.assert_array_equal(read_back(modules, "sided", (7, 5)), expected)
    by_layer = np.log2(places.chosen.sum(0) / places.eligible.sum(0) / share)
    expected = np.clip(np.floor((by_layer / exponent + 1) / 2 * 9), 0, 8)
    np.testing.assert_array_equal(read_back(above, "sided", (1, 5))[0], expected)


def test_a_pointer_over_a_row_finds_the_numbers_of_that_row() -> None:
    section = density(chosen_of("a", n_layers=3))
    rows = re.findall(r'<rect y="(\d+)"[^>]*height="20"[^>]*><title>([^:<]*):', section.replace(
        "<rect><title>", '<rect y="0"><title>'))  # fmt: skip
    found = {name: int(y) for y, name in rows}
    labels = re.findall(r'<text x="108" y="(\d+)"[^>]*>([^<]*)</text>', section)
    assert len(labels) == 8
    for y, label in labels:
        assert found[label] < int(y) < found[label] + 20


def test_an_even_choice_is_said_and_not_drawn() -> None:
    eligible = {f"h.{i}.attn.c_proj.weight": 1000 + i for i in range(4)}
    chosen = {name: n // 100 for name, n in eligible.items()}
    section = density(ChosenWeights(arm="a", eligible=eligible, chosen=chosen))
    assert "the same share of every tensor, 1.0\u202f%" in section
    assert not drawings(section)


def test_modules_without_a_choice_are_told_from_modules_that_are_not_there() -> None:
    eligible = {"h.0.a.weight": 100, "h.0.b.weight": 100, "h.1.a.weight": 100}
    section = density(ChosenWeights(arm="a", eligible=eligible, chosen={"h.0.b.weight": 9}))
    levels = read_back(drawings(section)[1], "sided", (2, 2))
    assert levels.tolist() == [[0, 0], [8 - 1, -1]] or levels.tolist() == [[0, 0], [8, -1]]
    assert "nothing to choose from" in section


def test_the_numbers_of_a_choice_are_told() -> None:
    facts = chosen_of("a")
    text = Page(density(facts)).text
    for words in (
        "gallop over the whole model",
        f"{facts.n_chosen:,} of {facts.n_eligible:,} eligible weights train",
        "0.78\u202f% of the model",
        "rank 3.48 is a LoRA of this size",
        "1,024 examples behind the scores",
        "12 of the chosen are exactly 0 in the base",
        "99.9\u202f% of the chosen moved",
    ):
        assert words in text
    assert "zeros win" not in text
    assert "rounded away" not in text


def test_what_should_make_a_reader_doubt_is_said() -> None:
    facts = chosen_of("a", about={"n_zero": 30_000, "silent": ["x", "y", SCRIPT, "z"]})
    section = density(dataclasses.replace(facts, n_moved=3))
    text = Page(section).text
    assert "are exactly 0 in the base: where small weights win, zeros win" in text
    assert f"The gradient of 4 tensors is 0 throughout: x, y, {SCRIPT}, …" in text
    assert f"{facts.n_chosen - 3:,} chosen weights ended as they began" in text
    assert SCRIPT not in section


def test_the_table_has_every_density_and_what_is_in_no_layer() -> None:
    eligible = {"wte.weight": 50, "h.0.a.weight": 100, "h.0.b.weight": 100, "h.1.a.weight": 100}
    chosen = {"wte.weight": 5, "h.0.b.weight": 30, "h.1.a.weight": 2}
    table = density(ChosenWeights(arm="a", eligible=eligible, chosen=chosen)).split("<details>")[1]
    rows = re.findall(r'<th scope="row">([^<]*)</th>((?:<td>[^<]*</td>)*)', table)
    found = {name: re.findall(r"<td>([^<]*)", row) for name, row in rows}
    percents = {k: [c.replace("\u202f", " ") for c in v] for k, v in found.items()}
    assert percents == {"0": ["0 %", "30 %"], "1": ["2.0 %", "–"], "wte": ["5 of 50", "10 %"]}


@pytest.mark.parametrize("zeros", [False, True])
def test_the_plane_has_the_colour_of_every_share(zeros: bool) -> None:
    facts = plane_facts("own", "random", m=12, g=9, zeros=zeros)
    section = plane(facts) or ""
    extra = 2 if zeros else 0
    for arm, drawn in zip(("own", "random"), drawings(section), strict=True):
        shape = (9 + extra, 12 + extra)
        colours, empty = (read_back(drawn, kind, shape) for kind in ("rising", "is"))
        low = round(np.log10(min(c.sum() for c in facts.chosen.values()) / facts.eligible.sum()))
        for a, b in np.ndindex(facts.eligible.shape):
            x, y = (k - 1 + extra if k else 0 for k in (a, b))
            if not zeros and 0 in (a, b):
                continue
            n, k = int(facts.eligible[a, b]), int(facts.chosen[arm][a, b])
            colour, grey = colours[shape[0] - 1 - y, x], empty[shape[0] - 1 - y, x]
            assert grey == (0 if n and not k else -1)
            if not k:
                assert colour == -1
                continue
            share = (np.log10(k / n) - (low - 1)) / (1 - low)
            assert colour == np.clip(np.floor(9 * share), 0, 8)
        if zeros:  # a gap sets zeros apart
            assert (colours[:, 1] == -1).all()
            assert (empty[-2] == -1).all()


def test_the_line_holds_nearly_all_weights_and_no_cell_too_many() -> None:
    facts = plane_facts("own", m=14, g=11)
    section = plane(facts) or ""
    path = re.findall(r'<path d="([^"]*)" class="bulk"', section)[0]
    edges = [(int(x), int(y), int(n)) for x, y, n in re.findall(r"M(\d+) (\d+)v(\d+)", path)]
    is_in = np.zeros((11, 14), bool)
    for row in range(11):
        crossings = sorted(x for x, y, n in edges if y <= row < y + n)
        for start, end in zip(crossings[::2], crossings[1::2], strict=True):
            is_in[row, start:end] = True
    counts = facts.eligible[1:, 1:].T[::-1]
    assert counts[is_in].sum() >= 0.99 * counts.sum()
    assert counts[is_in].sum() - counts[is_in].min() < 0.99 * counts.sum()
    assert counts[is_in].min() >= counts[~is_in].max()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30)), min_size=1, max_size=6))
def test_medians_leave_zeros_out_and_count_them(pairs: list[tuple[int, int]]) -> None:
    counts = np.zeros((6, 3), np.int64)
    for cell, n in pairs:
        counts[cell, 1] += n
    edges = [float(k) for k in range(6)]
    every = [cell for cell in range(1, 6) for _ in range(counts[cell, 1])]
    middle, zeros = medians(counts, edges, 0)
    total = counts.sum()
    assert zeros == (counts[0].sum() / total if total else 0)
    if every:
        assert middle == every[(len(every) - 1) // 2] - 0.5
    else:
        assert np.isnan(middle)


def test_the_plane_says_what_kind_of_weights_were_chosen() -> None:
    eligible = np.zeros((4, 4), np.int64)
    eligible[1, 3], eligible[3, 1] = 10, 100
    chosen = np.zeros((4, 4), np.int64)
    chosen[1, 3] = 10
    facts = WeightPlane(
        statistic="drift", magnitude=[-4.0, -3.0, -2.0, -1.0], gradient=[-4.0, -3.0, -2.0, -1.0],
        eligible=eligible, chosen={"a": chosen}, outside={"a": 7},
    )  # fmt: skip
    text = Page(plane(facts) or "").text
    assert "median |weight| 0.01 ×, |gradient| 100 × that of all" in text
    assert "Up: |change| in full fine-tuning" in text
    assert "tensors were not scored: 7 of a" in text
    assert "10⁻³" in text


def test_axes_have_their_numbers_where_they_belong() -> None:
    section = plane(plane_facts("a", m=40, g=36)) or ""
    marks = re.findall(r'<text x="([\d.]+)%" y="\d+"[^>]*>10⁻(.)</text>', section)
    assert len(marks) >= 4
    for x, exponent in marks:
        power_of = "⁰¹²³⁴⁵⁶⁷⁸⁹".index(exponent)
        assert float(x) == pytest.approx(100 * (6 - power_of) / 5, abs=0.01)


def test_each_cell_of_the_overlap_is_the_share_of_its_row() -> None:
    pair = SharedWeights(
        first="a", second="b", n_eligible=1000, n_first=100, n_second=20, n_both=15
    )
    section = shared([pair]) or ""
    rows = re.findall(r'<th scope="row"><bdi>(.)</bdi></th>(.*?)</tr>', section)
    found = {name: Page(tag("p", Markup(row))).text.replace("\u202f", " ") for name, row in rows}
    assert found == {"a": "–15 %chance 2.0 %", "b": "75 %chance 10 %–"}
    assert "Jaccard index 0.14" in section
    assert re.findall(r"share rising(\d)", section) == ["1", "6"]
    assert "<td>2</td>" in section  # by chance: 100 * 20 / 1000
    assert "Moved alike" not in section
    signed = shared([dataclasses.replace(pair, sign_agreement=0.5)]) or ""
    assert "Moved alike" in signed


def test_only_more_than_chance_is_bold() -> None:
    section = shared([shared_of("a", "b", 110), shared_of("a", "c", 5_000)]) or ""
    assert "<b>50\u202f%</b>" in section
    assert "<b>1.1" not in section
    assert section.count("–</span>") == 5  # itself, and the pair that nobody compared


def test_transfer_is_told_with_intervals_and_the_base() -> None:
    section = transfer([transfer_of("gallop"), transfer_of("lora", shift=-0.2)]) or ""
    text = Page(section).text
    for words in ("63.0", "[61.0, 66.0]", "+1.0", "−19.0", "20.0", "12.5", "base, untouched34.0"):
        assert words in text
    assert "3 seeds" in text
    assert "lora · siqa" in text
    assert "Answers that the model wrote" in text
    assert "no other task" not in text


def test_what_is_undefined_is_said_and_likelihood_has_no_collapse() -> None:
    facts = transfer_of("a", scoring="likelihood")
    estimates = {**facts.estimates, "forget_ratio": None}
    facts = dataclasses.replace(facts, estimates=estimates, n_undefined=5)
    section = transfer([facts]) or ""
    assert "Collapse" not in section
    assert "the base answers no other task: a 5 of 5 tasks" in section
    both = transfer([facts, transfer_of("a")]) or ""
    assert both.count('class="transfer"') == 2


def test_every_arm_has_its_part_and_its_name_is_text() -> None:
    facts = weight_facts("selected", SCRIPT, ARABIC)
    source = html_of(facts)
    page = Page(source)
    assert page.is_balanced
    for arm in ("selected", SCRIPT, ARABIC):
        assert f"Arm: {arm}" in page.text
    assert SCRIPT not in source.split("</style>")[1]
    assert len(page.all("id")) == len(set(page.all("id")))
    named = re.findall(r'<svg[^>]*role="img"[^>]*>(.{7})', source)
    assert set(named) == {"<title>"}


def test_the_part_stays_small() -> None:
    arms = ("gallop", "saft", "snip", "low", "high", "random", "fisher", "lota")
    assert len((trained(weight_facts(*arms)) or "").encode()) < 500_000


@pytest.mark.parametrize("facts", [None, WeightFacts()])
def test_nothing_is_told_where_nothing_was_found(facts: WeightFacts | None) -> None:
    assert trained(facts) is None


@pytest.mark.parametrize(
    ("chosen", "moved", "words"),
    [
        ({"b": 1}, None, "b: 1 weights chosen of none eligible"),
        ({"a": 5}, None, "a: 5 weights chosen of 4 eligible"),
        ({"a": -1}, None, "a: -1 weights"),
        ({"a": 2}, 3, "3 of 2 chosen weights moved"),
    ],
)
def test_counts_that_cannot_be_are_refused(
    chosen: dict[str, int], moved: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ChosenWeights(arm="x", eligible={"a": 4}, chosen=chosen, n_moved=moved)


@pytest.mark.parametrize(
    ("shape", "chosen"), [((3, 2), 0), ((2, 2), 2), ((2, 2), -1)], ids=["axes", "many", "few"]
)
def test_planes_that_cannot_be_are_refused(shape: tuple[int, int], chosen: int) -> None:
    one = np.ones(shape, np.int64)
    with pytest.raises(ValueError, match="counts do not fit 2 by 2 cells"):
        WeightPlane(
            statistic="", magnitude=[0.0, 1.0], gradient=[0.0, 1.0], eligible=one,
            chosen={"a": chosen * one},
        )  # fmt: skip


_SHARE = st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
_METRICS = ("id_accuracy", "ood_accuracy", "ood_gain", "forget_ratio", "collapse_percent")


@st.composite
def any_facts(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(
        st.lists(
            st.sampled_from(["h.0.a.weight", "h.1.a.weight", "h.0.b.bias", "wte.weight", "x"]),
            unique=True,
        )
    )
    eligible = {name: draw(st.integers(0, 50)) for name in names}
    chosen = {name: draw(st.integers(0, n)) for name, n in eligible.items()}
    counts = draw(hnp.arrays(np.int64, (4, 3), elements=st.integers(0, 9)))
    return {
        "eligible": eligible,
        "chosen": chosen,
        "moved": draw(st.none() | st.integers(0, sum(chosen.values()))),
        "counts": counts,
        "parts": draw(hnp.arrays(np.int64, (4, 3), elements=st.integers(0, 9))),
        "pair": draw(st.tuples(*[st.integers(0, 9)] * 3)),
        "estimates": draw(st.dictionaries(st.sampled_from(_METRICS), _SHARE)),
    }


@given(any_facts())
def test_any_facts_with_any_gaps_make_a_page(given_: dict[str, Any]) -> None:
    n_first, n_second, n_both = given_["pair"]
    facts = WeightFacts(
        chosen=[
            ChosenWeights(
                arm="a", eligible=given_["eligible"], chosen=given_["chosen"],
                n_moved=given_["moved"],
            )
        ],
        plane=WeightPlane(
            statistic="mean_gradient", magnitude=[-2.0, -1.0, 0.0, 1.0],
            gradient=[-9.0, 0.0, 9.0], eligible=given_["counts"],
            chosen={"a": np.minimum(given_["parts"], given_["counts"])},
        ),
        shared=[
            SharedWeights(
                first="a", second="b", n_eligible=9, n_first=n_first, n_second=n_second,
                n_both=min(n_first, n_second, n_both),
            )
        ],
        transfers=[
            TransferFacts(
                arm="a", scoring="generated", n_seeds=1, base={"t": 0.5, "u": 0.0},
                estimates=given_["estimates"], by_task={"t": dict.fromkeys(_METRICS)},
            )
        ],
    )  # fmt: skip
    page = Page(trained(facts) or "")
    assert page.is_balanced
    written = [page.text, *(v for _, found in page.elements for v in found.values())]
    assert not re.search(r"\b(nan|inf|not a number)\b", " ".join(written))


@pytest.mark.skipif(find_chromium() is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_part_fits_the_screen(width: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.html"
    path.write_text(html_of(weight_facts("selected", "x" * 300, SCRIPT, ARABIC)), "utf-8")
    binary = find_chromium()
    assert binary is not None
    with Browser(binary, tmp_path / "profile") as opened:
        visit = opened.visit(path.as_uri(), width=width, dark=width < 400)
    assert visit.complaints == []
    assert visit.scroll_width <= width
