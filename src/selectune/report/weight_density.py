"""How many weights train, and in which layers and modules."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from selectune.report import figures
from selectune.report.blocks import bullets, folded, panel, table
from selectune.report.layer_rows import FOOT, Foot, axis_below, pointed
from selectune.report.maps import Ramp
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.numbers import count, decimal
from selectune.report.weight_facts import ChosenWeights
from selectune.report.weight_marks import cells, drawn, fine_percent

_SCOPES = {
    "global": "over the whole model",
    "per_layer": "within each layer",
    "per_tensor": "within each tensor",
}
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_ROW = 20
_GAP = 8  # pixels between the row of all modules and theirs
_MOST_OUTSIDE = 40
_MANY_ZEROS = 0.1  # share of the chosen that is worth a remark


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The tensors of a model by layer and module.

    Attributes:
        layers: their numbers, ascending.
        modules: names within a layer, in the order of the model, as short as they can be.
        eligible: weights that could be chosen; 0 where a layer has no such module.
        chosen: weights that were.
        outside: name, eligible and chosen weights of each tensor that is in no layer.
    """

    layers: list[int]
    modules: list[str]
    eligible: Int[np.ndarray, "m l"]
    chosen: Int[np.ndarray, "m l"]
    outside: list[tuple[str, int, int]]

    @classmethod
    def of(cls, facts: ChosenWeights) -> "Places":
        """Return the tensors of an arm; experts of one layer count as one module."""
        found: dict[tuple[str, int], list[int]] = {}
        outside: list[tuple[str, int, int]] = []
        for name, n in facts.eligible.items():
            k = facts.chosen.get(name, 0)
            match = _LAYER.search(name)
            if match is None:
                outside.append((name.removesuffix(".weight"), n, k))
                continue
            rest = name[match.end() :].removesuffix(".weight")
            module = ".".join("*" if part.isdigit() else part for part in rest.split("."))
            sums = found.setdefault((module, int(match[1])), [0, 0])
            sums[0] += n
            sums[1] += k
        modules = list(dict.fromkeys(module for module, _ in found))
        layers = sorted({layer for _, layer in found})
        sizes = np.zeros((2, len(modules), len(layers)), np.int64)
        for (module, layer), sums in found.items():
            sizes[:, modules.index(module), layers.index(layer)] = sums
        names = short_names(modules)
        return cls(layers, [names[m] for m in modules], sizes[0], sizes[1], outside)


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """Return for each module the fewest last parts of its name that no other ends with."""
    found: dict[str, str] = {}
    for module in modules:
        parts = module.split(".")
        tails = [".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1)]
        if parts[-1] == "bias":  # of what, it must say
            tails = tails[1:] or tails
        found[module] = next(
            (t for t in tails if not any(m != module and f".{m}".endswith(f".{t}")
                                         for m in modules)),
            module,
        )  # fmt: skip
    return found


def density(facts: ChosenWeights) -> Markup:
    """Return what an arm trained: numbers, the map of densities, and a table."""
    places = Places.of(facts)
    return tag(
        "div",
        tag("div", _numbers(facts), _remarks(facts)),
        _map(facts, places),
        _table(facts, places),
        class_="questions",
    )


def _numbers(facts: ChosenWeights) -> Markup:
    about = facts.about
    budget: Mapping[str, float | None] = about.get("budget") or {}
    of_model, rank = budget.get("percent_of_model"), budget.get("lora_rank")
    pairs: list[tuple[str, str]] = []
    if method := about.get("method"):
        pairs.append((str(method), _SCOPES.get(str(about.get("scope")), "")))
    share = facts.n_chosen / max(1, facts.n_eligible)
    pairs.append((f"{facts.n_chosen:,}", f"of {facts.n_eligible:,} eligible weights train"))
    pairs.append((fine_percent(share), "of the eligible"))
    if of_model is not None:
        pairs.append((fine_percent(float(of_model) / 100), "of the model"))
    if rank is not None:
        pairs.append((f"rank {decimal(float(rank))}", "is a LoRA of this size"))
    if n := about.get("n_zero"):
        pairs.append((f"{int(n):,}", "of the chosen are exactly 0 in the base"))
    if n := about.get("n_examples"):
        pairs.append((count(int(n), "example"), "behind the scores"))
    if facts.n_moved is not None and facts.n_chosen:
        moved = facts.n_moved / facts.n_chosen
        pairs.append((fine_percent(moved), "of the chosen moved"))
    told = [tag("span", tag("b", number), f" {words}") for number, words in pairs]
    return tag("p", join(told), class_="facts")


def _remarks(facts: ChosenWeights) -> Markup | None:
    """Return what a reader should know before trusting the choice."""
    found: list[Child] = []
    zeros = int(facts.about.get("n_zero") or 0) / max(1, facts.n_chosen)
    if zeros > _MANY_ZEROS:
        found.append(
            f"{fine_percent(zeros)} of the chosen weights are exactly 0 in the base: where small "
            "weights win, zeros win whatever they do."
        )
    silent = [str(name) for name in facts.about.get("silent") or ()]
    if silent:
        found.append(
            f"The gradient of {count(len(silent), 'tensor')} is 0 throughout: "
            + ", ".join(shortened(name, 60) for name in silent[:3])
            + (", …" if len(silent) > 3 else ".")
        )
    if facts.n_moved is not None and facts.n_moved < 0.5 * facts.n_chosen:
        n = facts.n_chosen - facts.n_moved
        found.append(
            f"{count(n, 'chosen weight')} ended as they began: their changes were rounded away, "
            "or training gave them none."
        )
    return bullets(found, class_="warnings") if found else None


def _map(facts: ChosenWeights, places: Places) -> Markup | None:
    if not places.layers:
        return None
    share = facts.n_chosen / max(1, facts.n_eligible)
    expected = share * places.eligible
    title = "Where are they?"
    if bool((np.abs(places.chosen - expected) < 1).all()):
        words = f"the same share of every tensor, {fine_percent(share)}"
        return panel(join([title, tag("span", f" · {words}", class_="soft")]))
    lift = _lift(places.chosen, places.eligible, share)
    by_layer = _lift(places.chosen.sum(0), places.eligible.sum(0), share)[None]
    known = np.abs(np.concatenate([lift.ravel(), by_layer.ravel()]))
    reach = min(5, max(1, math.ceil(float(known[np.isfinite(known)].max(initial=0)) - 1e-9)))
    ramp = Ramp(float(-reach), float(reach), "sided")
    words = _words(places)
    key = ramp.key(
        f"1/{2**reach} of it or less", f"{2**reach} times or more",
        middle=f"{fine_percent(share)}, the density of all",
    )  # fmt: skip
    n_rows, n_layers = len(places.modules), len(places.layers)
    top = _ROW + _GAP
    height = top + _ROW * n_rows
    lift, by_layer = (np.clip(values, -reach, reach) for values in (lift, by_layer))
    figure = figures.figure(
        f"density of chosen weights by module and layer: {words}",
        height + FOOT,
        drawn(1, n_layers, _ROW, *cells(ramp(by_layer), ramp.kind)),
        drawn(n_rows, n_layers, _ROW * n_rows, *cells(ramp(lift), ramp.kind), y=top),
        # Strips are numbered from the bottom.
        *pointed(_titles(places)[:0:-1], _ROW, top),
        *pointed(_titles(places)[:1], _ROW, 0),
        *axis_below(_foot(places.layers), height),
        class_="fig cells-over",
    )
    totals = [facts.n_chosen - sum(k for _, _, k in places.outside), *places.chosen.sum(1)]
    sizes = [facts.n_eligible - sum(n for _, n, _ in places.outside), *places.eligible.sum(1)]
    shares = [fine_percent(float(k / max(1, n))) for k, n in zip(totals, sizes, strict=True)]
    missing = bool((places.eligible == 0).any())
    return panel(
        join([title, tag("span", f" · {words}", class_="soft")]),
        key,
        figures.key({"none cell": "nothing to choose from"}) if missing else None,
        tag("div", _labels(["all modules", *places.modules], 112, "end", height),
            figure, _labels(shares, 52, "start", height), class_="map modules"),
        note="Colours compare each matrix with the density of all eligible weights, in steps that "
        "double. The top row is all modules of a layer together; numbers are for all layers.",
    )  # fmt: skip


def _lift(
    chosen: Int[np.ndarray, "*s"], eligible: Int[np.ndarray, "*s"], share: float
) -> Float[np.ndarray, "*s"]:
    """Return log2 of density over `share`: NaN where nothing could be chosen."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log2(chosen / eligible) - math.log2(share) if share else np.zeros(chosen.shape)
    return np.where(eligible == 0, np.nan, found)


def _words(places: Places) -> str:
    """Return the densest and the sparsest module in words."""
    sums = places.chosen.sum(1) / np.maximum(1, places.eligible.sum(1))
    if len(sums) < 2:
        shares = places.chosen[0] / np.maximum(1, places.eligible[0])
        return f"{fine_percent(float(shares.min()))} to {fine_percent(float(shares.max()))}"
    most, least = int(sums.argmax()), int(sums.argmin())
    return (
        f"most in {places.modules[most]}, {fine_percent(float(sums[most]))}; "
        f"least in {places.modules[least]}, {fine_percent(float(sums[least]))}"
    )


def _titles(places: Places) -> list[str]:
    """Return what a pointer over each row shows: all modules, then each of them."""
    tables = [
        ("all modules", places.chosen.sum(0), places.eligible.sum(0)),
        *zip(places.modules, places.chosen, places.eligible, strict=True),
    ]
    found: list[str] = []
    for name, chosen, eligible in tables:
        shares = chosen / np.maximum(1, eligible)
        most, least = int(shares.argmax()), int(np.where(eligible > 0, shares, np.inf).argmin())
        found.append(
            f"{name}: {chosen.sum():,} of {eligible.sum():,} weights; most in layer "
            f"{places.layers[most]}, {fine_percent(float(shares[most]))}; least in layer "
            f"{places.layers[least]}, {fine_percent(float(shares[least]))}"
        )
    return found


def _foot(layers: Sequence[int]) -> Foot:
    n = len(layers)
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100, 1000) if n <= 10 * k)
    marks = [(100 * (i + 0.5) / n, f"{layers[i]}") for i in range(0, n, every)]
    return Foot(marks, "layer, 0 is next to the input")


def _labels(words: Sequence[str], width: int, side: str, height: int) -> Markup:
    """Return a word beside each row, the first above the gap."""
    x = width - 4 if side == "end" else 2
    rows = [
        tag("text", shortened(word, 16), x=x, y=_ROW * (i + 0.5) + 4 + (_GAP if i else 0),
            text_anchor=side, class_="tick")
        for i, word in enumerate(words)
    ]  # fmt: skip
    return tag(
        "svg", *rows, width=width, height=height + FOOT, class_="fig labels", aria_hidden="true"
    )


def _table(facts: ChosenWeights, places: Places) -> Markup:
    """Return every density as a number, for those who cannot see the map."""
    rows: list[list[Child]] = []
    for place, layer in enumerate(places.layers):
        pairs = zip(places.chosen[:, place], places.eligible[:, place], strict=True)
        rows.append([f"{layer}", *(fine_percent(float(k / n)) if n else "–" for k, n in pairs)])
    outside: list[list[Child]] = [
        [shortened(name, 60), f"{k:,} of {n:,}", fine_percent(k / max(1, n))]
        for name, n, k in places.outside[:_MOST_OUTSIDE]
    ]
    n_more = len(places.outside) - _MOST_OUTSIDE
    return folded(
        "Densities by layer and module",
        table(["Layer", *places.modules], rows, class_="plain") if rows else None,
        table(["Outside the layers", "Chosen", "Density"], outside, class_="plain narrow apart")
        if outside
        else None,
        tag("p", f"{n_more} more.", class_="note") if n_more > 0 else None,
        tag("p", f"Of {count(len(facts.eligible), 'tensor')}.", class_="note"),
    )
