"""What was trained: which layers, when, and what each of them learned from."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from selectune.report import figures
from selectune.report.agreement import agreement
from selectune.report.blocks import folded, isolated, listed, panel, section
from selectune.report.contents import ReportData, TrainingFacts
from selectune.report.layer_examples import length_panel, pick_panel
from selectune.report.layer_rows import Side, percent_of
from selectune.report.layer_summary import number, numbers_table, profiles
from selectune.report.maps import Head, Ramp, layer_map, step_foot
from selectune.report.markup import Markup, join, tag
from selectune.report.numbers import count
from selectune.report.steps import Steps, columns, mean_by_layer

_MOST_COLUMNS = 80


def trained(data: ReportData) -> Markup | None:
    """Return what the training method did in every arm that has one."""
    arms = [(facts.arm, body) for facts in data.training if (body := _arm(facts)) is not None]
    if not arms:
        return None
    shown = [
        tag("div", tag("h3", join(["Arm: ", isolated(arms[0][0])])), arms[0][1], class_="task"),
        *(folded(join(["Arm: ", isolated(arm)]), body) for arm, body in arms[1:]),
    ]
    return section(
        "layers",
        "What was trained",
        "Which layers of the model the training method worked on, and which examples each layer "
        "learned from. Layer 0 is next to the input; point at a row for its numbers.",
        *shown,
    )


def _arm(facts: TrainingFacts) -> Markup | None:
    steps = Steps(facts)
    if not len(steps.step):
        return None
    alike = agreement(steps.picks(), facts.n_layers)
    panels = [
        _importance(steps),
        _activity(steps),
        pick_panel(steps, alike),
        length_panel(steps, alike),
        profiles(steps),
    ]
    if not any(panels):
        return None
    return tag(
        "div",
        tag("p", facts.note, class_="note") if facts.note else None,
        *panels,
        numbers_table(steps, alike),
        class_="questions",
    )


def _importance(steps: Steps) -> Markup | None:
    """Return importance over time: what a layer sampler draws layers by."""
    values = steps.of("importance")
    is_told = np.isfinite(values).any(1)
    if not is_told.any():
        return None
    probes = steps.step[is_told]
    found = columns(probes, values[is_told], _MOST_COLUMNS, int(steps.step[-1]) + 1)
    last = values[is_told][-1]
    reach = max(0.01, _round_up(float(np.nanmax(np.abs(values[is_told] - 0.5)))))
    ramp = Ramp(0.5 - reach, 0.5 + reach, "sided")
    words = _extremes(last, steps.layers)
    names = [
        f"layer {layer}: importance {number(first)} at first, {number(end)} at the end"
        for layer, first, end in zip(steps.layers, values[is_told][0], last, strict=True)
    ]
    note = f"One column per probe, {count(len(probes))} in all."
    if found.per_column > 1:
        note = f"{count(len(probes), 'probe')}; a column is the mean of up to {found.per_column}."
    return panel(
        join(["Which layers matter most?", tag("span", f" · {words}", class_="soft")]),
        ramp.key(f"{0.5 - reach:.2f} matters less", f"{0.5 + reach:.2f} matters more",
                 middle="0.5, where all layers start"),
        layer_map(found.values.T, ramp, f"importance of each layer over the steps: {words}",
                  layers=steps.layers, row_titles=names, foot=step_foot(found.edges),
                  side=Side(last, "at the end", 1.0)),
        note="Importance is sigmoid(−u): the weight by which layers are drawn for training. It "
        f"rises where turning the layer down raised the loss. {note}",
    )  # fmt: skip


def _activity(steps: Steps) -> Markup | None:
    """Return which layers were trained when."""
    values = steps.active()
    is_told = np.isfinite(values).any(1)
    if not is_told.any():
        return None
    values, told = values[is_told], steps.step[is_told]
    per_step = values.sum(1)
    n_layers, n_steps = len(steps.layers), len(told)
    share = mean_by_layer(values)
    few, many = int(per_step.min()), int(per_step.max())
    if few == many == n_layers:
        words = f"all {n_layers} in every one of {count(n_steps, 'step')}"
        heading = join(["Which layers were trained?", tag("span", f" · {words}", class_="soft")])
        return panel(heading)
    size = f"{few}" if few == many else f"{few} to {many}, {per_step.mean():.1f} on average,"
    words = f"{size} of {n_layers} layers in each step"
    found = columns(told, values, _MOST_COLUMNS, int(told[-1]) + 1)
    if found.per_column > 1:
        top = _round_up(float(found.values.max()))
        ramp = Ramp(0.0, top)
        key = ramp.key("never", f"in {percent_of(top)} of the steps")
        note = f"A column holds up to {found.per_column} of {count(n_steps, 'step')}."
    else:
        ramp = Ramp(0.0, 1.0, "is")
        key = figures.key({"is1 cell": "trained", "is0 cell": "frozen"})
        note = "One column per step."
    names = [
        f"layer {layer}: trained in {n:.0f} of {count(n_steps, 'step')} ({percent_of(s)})"
        for layer, n, s in zip(steps.layers, values.sum(0), share, strict=True)
    ]
    # One number for all steps needs no bars.
    head = None if few == many else Head(found.values.sum(1), "Active")
    return panel(
        join(["Which layers were trained, and when?",
              tag("span", f" · {words}", class_="soft")]),
        key,
        layer_map(found.values.T, ramp, f"steps in which each layer was trained: {words}",
                  layers=steps.layers, row_titles=names, foot=step_foot(found.edges),
                  side=Side(share, "of all steps", _round_up(float(share.max())), "%"),
                  head=head),
        note=note + (
            f" Above: active layers per step; the highest bar is {found.values.sum(1).max():.1f}."
            if head
            else ""
        ),
    )  # fmt: skip


def _extremes(values: Float[np.ndarray, " l"], layers: Sequence[int]) -> str:
    """Return the layers with the largest and the smallest values in words."""
    if not np.isfinite(values).all() or float(np.ptp(values)) < 0.005 or len(layers) < 4:
        return f"{number(float(np.nanmin(values)))} to {number(float(np.nanmax(values)))}"
    n = min(3, len(layers) // 2)
    order = np.argsort(values, kind="stable")
    least, most = (sorted(layers[i] for i in part) for part in (order[:n], order[-n:]))
    return f"most: {listed([str(i) for i in most])}; least: {listed([str(i) for i in least])}"


def _round_up(share: float) -> float:
    """Return a share of 1 rounded up to a tenth, a small one to a hundredth."""
    step = 10 if share > 0.1 else 100
    return min(1.0, max(1, float(np.ceil(step * share - 1e-9))) / step)
