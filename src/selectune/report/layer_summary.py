"""One number per layer: alignment with the target, outliers, tokens; and a table of them all."""

import numpy as np
from jaxtyping import Float

from selectune.report import figures
from selectune.report.agreement import Agreement
from selectune.report.blocks import folded, panel, table
from selectune.report.layer_profiles import layer_bars, layer_lines
from selectune.report.layer_rows import Side, percent_of
from selectune.report.markup import Child, Markup, tag
from selectune.report.numbers import decimal
from selectune.report.steps import Steps, mean_by_layer


def profiles(steps: Steps) -> Markup | None:
    """Return one number per layer: alignment, its outliers, tokens."""
    drawn = [p for p in (_alignment(steps), _outliers(steps), _tokens(steps)) if p]
    return tag("div", *drawn, class_="pair trio") if drawn else None


def alignment(steps: Steps) -> tuple[Float[np.ndarray, " l"], Float[np.ndarray, " l"]]:
    """Return mean and standard deviation of each layer's alignments over all steps.

    Steps count equally; the deviation has both parts, within steps and between them.
    """
    mean, spread = steps.of("alignment_mean"), steps.of("alignment_std")
    spread[np.isnan(spread) & np.isfinite(mean)] = 0
    middle = mean_by_layer(mean)
    return middle, np.sqrt(mean_by_layer(spread**2 + (mean - middle) ** 2))


def _alignment(steps: Steps) -> Markup | None:
    middle, spread = alignment(steps)
    if not np.isfinite(middle).any():
        return None
    spans = list(zip(middle - spread, middle + spread, strict=True))
    scale = figures.Scale.around([0.0, *(float(v) for span in spans for v in span)])
    names = [
        f"layer {layer}: {number(m)} ± {number(s)}"
        for layer, m, s in zip(steps.layers, middle, spread, strict=True)
    ]
    above = int((middle > 0).sum())
    words = f"mean above 0 in {above} of {int(np.isfinite(middle).sum())} layers"
    return panel(
        "Do examples pull towards the target?",
        layer_lines(scale, f"alignment of examples with the target, by layer: {words}",
                    layers=steps.layers, row_titles=names, spans=[(float(a), float(b))
                    for a, b in spans], dots=middle.tolist(), label="alignment score", zero=0.0),
        note="Dot: mean over all steps; line: ± one standard deviation. Right of 0, learning from "
        f"the example lowers the target's loss. Here: {words}.",
    )  # fmt: skip


def _outliers(steps: Steps) -> Markup | None:
    largest = steps.of("max_z")
    if not np.isfinite(largest).any():
        return None
    middle = mean_by_layer(largest)
    top = np.where(np.isfinite(largest), largest, -np.inf).max(0)
    top = np.where(np.isfinite(top), top, np.nan)
    spans = [(float(a), float(b)) for a, b in zip(middle, top, strict=True)]
    most = float(np.nanmax(top))
    names = [
        f"layer {layer}: largest |z| {number(m)} on average, {number(t)} at most"
        for layer, m, t in zip(steps.layers, middle, top, strict=True)
    ]
    return panel(
        "Does one example drown the others?",
        layer_lines(figures.Scale(0.0, 1.06 * most or 1.0),
                    f"largest |z| of a step, by layer; {decimal(most)} at most",
                    layers=steps.layers, row_titles=names, spans=spans, dots=middle.tolist(),
                    label="largest |z| of a step, in std"),
        note="How far the most extreme example lies from its batch. Dot: mean over steps; line: up "
        "to the worst step. Far out, one example decides and the rest are drawn by chance.",
    )  # fmt: skip


def _tokens(steps: Steps) -> Markup | None:
    told = steps.of("tokens")
    if not np.isfinite(told).any():
        return None
    total = np.where(np.isfinite(told), told, 0).sum(0)
    names = [
        f"layer {layer}: {n:,.0f} tokens" for layer, n in zip(steps.layers, total, strict=True)
    ]
    few, many = f"{total.min():,.0f}", f"{total.max():,.0f}"
    words = f"{many if few == many else f'{few} to {many}'} per layer"
    factor, unit = (1000, "thousand ") if total.max() >= 10_000 else (1, "")
    side = Side(total / factor, f"{unit}target tokens", float(total.max()) / factor or 1.0)
    return panel(
        "How much did each layer learn from?",
        layer_bars(side, f"target tokens whose gradient reached each layer: {words}",
                   layers=steps.layers, row_titles=names),
        note=f"Target tokens whose gradient reached the layer, over all steps: {words}.",
    )  # fmt: skip


def numbers_table(steps: Steps, alike: Agreement) -> Markup:
    """Return everything that is drawn per layer as a table, for those who cannot see it."""
    importance = steps.of("importance")
    told = importance[np.isfinite(importance).any(1)]
    middle, spread = alignment(steps)
    cosine, largest = mean_by_layer(steps.of("target_cosine")), mean_by_layer(steps.of("max_z"))
    tokens = steps.of("tokens")
    total = np.where(np.isfinite(tokens).any(0), np.nan_to_num(tokens).sum(0), np.nan)
    same = np.append(np.diagonal(alike.same, 1), np.nan)
    made: dict[str, list[str]] = {
        "Importance at the end": [number(v) for v in told[-1]] if len(told) else [],
        "Steps trained": [percent_of(v) for v in mean_by_layer(steps.active())],
        "Examples picked": [percent_of(v) for v in alike.rate()],
        "Same picks as the next layer": [percent_of(v) for v in same],
        "Target tokens": ["–" if np.isnan(v) else f"{v:,.0f}" for v in total],
        "Alignment": [
            "–" if np.isnan(m) else f"{number(m)} ± {number(s)}"
            for m, s in zip(middle, spread, strict=True)
        ],
        "Largest |z|": [number(v) for v in largest],
        "Cosine of target gradients": [number(v) for v in cosine],
    }
    kept = {name: cells for name, cells in made.items() if any(c != "–" for c in cells)}
    rows: list[list[Child]] = [
        [f"{layer}", *(cells[i] for cells in kept.values())] for i, layer in enumerate(steps.layers)
    ]
    return folded("Numbers by layer", table(["Layer", *kept], rows, class_="plain"))


def number(value: float) -> str:
    """Return a number as the page writes it, "–" where there is none."""
    return "–" if np.isnan(value) else decimal(float(value))
