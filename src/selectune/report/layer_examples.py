"""Which examples each layer picked: the last steps, agreement between layers, and lengths."""

import numpy as np

from selectune.report import figures
from selectune.report.agreement import Agreement, length_rates
from selectune.report.blocks import panel, table
from selectune.report.layer_rows import Foot, Side, percent_of
from selectune.report.maps import Head, Ramp, layer_map
from selectune.report.markup import Child, Markup, join, tag
from selectune.report.numbers import count
from selectune.report.steps import Picks, Steps

_MOST_EXAMPLES = 96  # columns of the last steps
_MOST_STEPS = 8
_MOST_IN_A_STEP = 256


def pick_panel(steps: Steps, alike: Agreement) -> Markup | None:
    """Return who picked what in the last steps, and how alike layers pick over all of them."""
    if not alike.seen.any():
        return None
    shown = _last(steps)
    widths = [min(step.picked.shape[1], _MOST_IN_A_STEP) for step in shown]
    cells = np.full((len(steps.layers), sum(widths)), np.nan)
    at = 0
    for step, width in zip(shown, widths, strict=True):
        # Most wanted first: layers that agree make a wedge, layers that do not make noise.
        picked = step.picked[:, :width]
        order = np.argsort(-picked.sum(0), kind="stable")
        cells[step.places, at : at + width] = picked[:, order]
        at += width
    ends = np.cumsum(widths)
    middles = (ends - np.asarray(widths) / 2) / at
    foot = Foot(
        [(100 * float(m), f"{s.step:,}") for m, s in zip(middles, shown, strict=True)],
        "examples by step, most picked first →",
        [100 * float(e) / at for e in ends[:-1]],
    )
    near, chance = alike.apart(1)
    words = ""
    if np.isfinite(near):
        words = (
            f"neighbours share {percent_of(near)} of their picks, {percent_of(chance)} by chance"
        )
    rates = alike.rate()
    names = [
        f"layer {layer}: picked {p:,.0f} of {s:,.0f} examples ({percent_of(r)})"
        for layer, p, s, r in zip(steps.layers, alike.picked, alike.seen, rates, strict=True)
    ]
    key = {"is1 cell": "picked", "is0 cell": "left out"}
    if np.isnan(cells).any():
        key["none cell"] = "layer frozen"
    is_cut = any(step.picked.shape[1] > _MOST_IN_A_STEP for step in shown)
    return panel(
        join(["Do layers pick the same examples?",
              tag("span", f" · {words}", class_="soft") if words else None]),
        figures.key(key),
        layer_map(cells, Ramp(0.0, 1.0, "is"),
                  "examples that each layer picked in the last "
                  f"{count(len(shown), 'step')}{': ' + words if words else ''}",
                  layers=steps.layers, row_titles=names, foot=foot,
                  side=Side(rates, "picked, all steps", 1.0, "%")),
        _apart(alike, steps),
        note="In common: of the examples that either layer picked, the share that both did "
        "(Jaccard index), mean over all steps. By chance: what blind draws of the same sizes would "
        "share."
        + (f" Only the first {_MOST_IN_A_STEP} examples of a step are drawn." if is_cut else ""),
    )  # fmt: skip


def length_panel(steps: Steps, alike: Agreement) -> Markup | None:
    """Return pick rates by the length of the example."""
    found = length_rates(steps.picks(), len(steps.layers)) if alike.seen.any() else None
    if found is None:
        return None
    rates, overall, mean = found.by_layer(), found.overall(), found.mean()
    known = np.abs(rates[np.isfinite(rates)] - mean)
    reach = max(0.05, float(np.ceil(20 * np.quantile(known, 0.98)) / 20))
    ramp = Ramp(mean - reach, mean + reach, "sided")
    words = (
        f"{percent_of(overall[0])} of the shortest are picked, {percent_of(overall[-1])} of the "
        "longest"
    )
    slot = 100 / len(found.labels)
    names = [
        f"layer {layer}: "
        + ", ".join(f"{label} tokens {percent_of(r)}"
                    for label, r in zip(found.labels, row, strict=True))
        for layer, row in zip(steps.layers, rates, strict=True)
    ]  # fmt: skip
    return panel(
        join(["Are short answers picked more often?", tag("span", f" · {words}", class_="soft")]),
        ramp.key(f"{percent_of(max(0.0, mean - reach))} or less",
                 f"{percent_of(min(1.0, mean + reach))} or more",
                 middle=f"{percent_of(mean)}, the rate of all examples"),
        layer_map(rates, ramp, f"share of examples picked, by answer length and layer: {words}",
                  layers=steps.layers, row_titles=names,
                  foot=Foot([(slot * (i + 0.5), label) for i, label in enumerate(found.labels)],
                            "target tokens of the example"),
                  head=Head(overall, "All", [percent_of(r) for r in overall], mean)),
        note="Bars: all layers together, the dashed line is the rate of all examples. Groups of "
        "lengths hold about equally many examples. A raw inner product prefers short answers, "
        "whose gradients are long; a cosine does not.",
    )  # fmt: skip


def _last(steps: Steps) -> list[Picks]:
    """Return the last steps that have room side by side, at least one."""
    shown: list[Picks] = []
    used = 0
    for step in steps.picks(newest_first=True):
        width = step.picked.shape[1]
        if shown and (used + width > _MOST_EXAMPLES or len(shown) == _MOST_STEPS):
            break
        used += width
        shown.insert(0, step)
    return shown


def _apart(alike: Agreement, steps: Steps) -> Markup | None:
    """Return how agreement falls with the distance between layers, in a few rows."""
    rows: list[list[Child]] = []
    for distance in (1, 2, 4, 8, 16, 32, 64):
        same, chance = alike.apart(distance)
        if np.isfinite(same):
            name = "next to each other" if distance == 1 else f"{distance} layers apart"
            rows.append([name, percent_of(same), percent_of(chance)])
    if not rows:
        return None
    pairs = np.diagonal(alike.same, 1)
    if np.isfinite(pairs).sum() > 1:
        for place, words in ((np.nanargmax(pairs), "most"), (np.nanargmin(pairs), "least")):
            first, second = steps.layers[place : place + 2]
            name = f"neighbours that agree {words}: {first} and {second}"
            chance = float(np.diagonal(alike.chance, 1)[place])
            rows.append([name, percent_of(float(pairs[place])), percent_of(chance)])
    return table(["Two layers", "Picks in common", "By chance"], rows, class_="plain narrow apart")
