"""What was chosen and why: composition, scores, target space, captured energy, lengths."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from selectune.report import figures
from selectune.report.blocks import drawn_rows, folded, isolated, panel, section, table
from selectune.report.contents import ReportData
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.numbers import count, decimal, percent

_SHOWN_SOURCES = 12
_SHOWN_TASKS = 6
_OPEN_SCORES = 2
_SHOWN_DIRECTIONS = 120
_KEY = {"pool": "pool", "selected": "selection"}


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The pool by source, with a mark at every chosen example."""

    sources: tuple[str, ...]  # most of the selection first, then most of the pool
    source_of: Int[np.ndarray, " n"]
    is_chosen: Bool[np.ndarray, " n"]

    @classmethod
    def of(cls, data: ReportData) -> "Choice":
        """Return the choice of a run."""
        chosen = frozenset(data.selected_ids)
        is_chosen = np.fromiter((i in chosen for i in data.pool.ids), bool, len(data.pool.ids))
        names, codes = np.unique(np.asarray(list(data.pool.sources), np.str_), return_inverse=True)
        n_pool = np.bincount(codes, minlength=len(names))
        n_chosen = np.bincount(codes[is_chosen], minlength=len(names))
        order = np.lexsort((names, -n_pool, -n_chosen))
        place = np.empty(len(names), np.int64)
        place[order] = np.arange(len(names))
        return cls(tuple(str(names[i]) for i in order), place[codes], is_chosen)

    def counts(self) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
        """Return examples per source, in the pool and in the selection."""
        n = len(self.sources)
        return (
            np.bincount(self.source_of, minlength=n),
            np.bincount(self.source_of[self.is_chosen], minlength=n),
        )

    def groups(self) -> list[tuple[str, Bool[np.ndarray, " n"]]]:
        """Return (label, members) of the sources worth a row; small ones share the last."""
        n = len(self.sources)
        shown = n if n <= _SHOWN_SOURCES + 1 else _SHOWN_SOURCES
        groups = [(self.sources[i], self.source_of == i) for i in range(shown)]
        if shown < n:
            groups.append((f"{n - shown} other sources", self.source_of >= shown))
        return groups


def composition(data: ReportData, choice: Choice) -> Markup:
    """Return pool and selection by source."""
    n_pool, n_chosen = len(choice.is_chosen), int(choice.is_chosen.sum())
    shares = [
        (
            label,
            float(of.sum()) / max(n_pool, 1),
            float((of & choice.is_chosen).sum()) / max(n_chosen, 1),
        )
        for label, of in choice.groups()
    ]
    # The row of all small sources has numbers but no bars: its length would dwarf the others.
    n_drawn = len(shares) if len(shares) == len(choice.sources) else len(shares) - 1
    most = max((max(p, c) for _, p, c in shares[:n_drawn]), default=0) or 1.0
    rows: list[list[Child]] = []
    for place, (label, pool, chosen) in enumerate(shares):
        words = f"{percent(pool)} of the pool, {percent(chosen)} of the selection"
        rows.append(
            [
                _source(label),
                figures.twin_bars(pool, chosen, most, f"{label}: {words}")
                if place < n_drawn
                else None,
                join([tag("span", percent(pool), class_="soft"), " → ", tag("b", percent(chosen))]),
            ]
        )
    n_by, k_by = choice.counts()
    full = [
        (_source(source, 60), f"{int(n):,}", f"{int(k):,}", percent(n / max(n_pool, 1)),
         percent(k / max(n_chosen, 1)), _lift(k / max(n_chosen, 1), n / max(n_pool, 1)))
        for source, n, k in zip(choice.sources, n_by, k_by, strict=True)
    ]  # fmt: skip
    left_out = [(isolated(reason), f"{n:,}") for reason, n in data.left_out.items() if n]
    missing = len(set(data.selected_ids)) - n_chosen
    return section(
        "chosen",
        "What was chosen",
        join([
            f"{count(n_chosen)} of {count(n_pool, 'pool example')}. Each source's share of the "
            "pool is set against its share of the selection.",
            f" {count(missing, 'chosen id')} not found in the pool table." if missing > 0 else None,
        ]),
        figures.key(_KEY),
        drawn_rows(rows),
        folded(
            "Numbers by source",
            table(
                ["Source", "Pool", "Chosen", "Share of pool", "Share of selection", "Ratio"],
                full,
                class_="plain",
            ),
        ),
        tag("div", tag("h3", "Left out before ranking"),
            table(["Reason", "Examples"], left_out, class_="plain narrow"), class_="task")
        if left_out else None,
    )  # fmt: skip


def scores(data: ReportData, choice: Choice) -> Markup | None:
    """Return the distribution of scores, source by source."""
    tables = {task: np.asarray(s, np.float64) for task, s in data.pool.scores.items()}
    shown = [
        _score_panel(task, values, choice) for task, values in list(tables.items())[:_SHOWN_TASKS]
    ]
    if not shown:
        return None
    summary = data.method_summary.strip().rstrip(".")
    if summary and not summary.lower().startswith(data.method.replace("_", " ").lower()):
        summary = f"{data.method}: {summary}"
    return section(
        "scores",
        "Scores by source",
        join([
            "A higher score comes first. ",
            f"{summary or 'Method: ' + data.method}. " if summary or data.method else None,
            "Each row has its own height, so that small sources can be seen.",
        ]),
        figures.key(_KEY),
        *shown[:_OPEN_SCORES],
        folded(f"{len(shown) - _OPEN_SCORES} more", *shown[_OPEN_SCORES:])
        if len(shown) > _OPEN_SCORES else None,
        _more(len(tables), "score tables"),
    )  # fmt: skip


def target_space(data: ReportData) -> Markup | None:
    """Return the spectrum of every target task."""
    if not data.spectra:
        return None
    panels: list[Markup] = []
    for found in data.spectra[:_SHOWN_TASKS]:
        values = np.clip(np.asarray(found.eigenvalues, np.float64), 0, None)
        total = float(values.sum()) or 1.0
        held = float(values[: found.rank].sum()) / total
        words = f"rank {found.rank} of {len(values)} holds {percent(held)} of the energy"
        cut = len(values) > _SHOWN_DIRECTIONS
        drawn = figures.spectrum(
            values[:_SHOWN_DIRECTIONS] / total, found.rank, f"{found.task}: {words}"
        )
        note = f"Only the first {_SHOWN_DIRECTIONS} directions are drawn." if cut else ""
        label = join([isolated(found.task), tag("span", f" · {words}", class_="soft")])
        panels.append(panel(label, drawn, note=note))
    return section(
        "target",
        "Target space",
        "The gradients of the target examples span a few directions. Each bar is one direction's "
        "share of their energy, strongest first; the line adds them up. Only the coloured ones, "
        "left of the dashed line, are used to score the pool.",
        figures.key({"selected": "used", "pool": "not used", "line": "added up"}),
        tag("div", *panels, class_="pair"),
        _more(len(data.spectra), "target tasks"),
    )


def energy(data: ReportData, choice: Choice) -> Markup | None:
    """Return how much of each gradient lies inside the target space."""
    tables = list(data.pool.energy.items())
    if not tables:
        return None
    panels: list[Markup] = []
    for task, values in tables[:_SHOWN_TASKS]:
        drawn, medians = _twin_histogram(
            np.asarray(values, np.float64), choice, "captured energy", figures.Scale(0.0, 1.0)
        )
        label = [isolated(task or "all tasks"), tag("span", f" · {medians}", class_="soft")]
        panels.append(panel(join(label), drawn))
    return section(
        "energy",
        "Captured energy",
        "The share of an example's gradient that lies inside the target space: near 0, the example "
        "asks for something the target does not; near 1, for nothing else. A score says only in "
        "which direction that part points, so a high score with little energy is a weak match.",
        figures.key(_KEY),
        tag("div", *panels, class_="pair"),
        _more(len(tables), "target tasks"),
    )


def lengths(data: ReportData, choice: Choice) -> Markup | None:
    """Return the token lengths of pool and selection."""
    n_tokens = np.asarray(data.pool.n_tokens, np.float64)
    if not len(n_tokens):
        return None
    # Few very long rows would squeeze all others into one bin: they share the last one.
    top = max(float(np.quantile(n_tokens, 0.99)), float(n_tokens.min()) + 1)
    is_cut = float(n_tokens.max()) > top
    drawn, medians = _twin_histogram(
        np.minimum(n_tokens, top), choice, "length in tokens", figures.Scale(0.0, top),
        last=f"{top:,.0f} or more" if is_cut else "",
    )  # fmt: skip
    totals = int(n_tokens.sum()), int(n_tokens[choice.is_chosen].sum())
    return section(
        "lengths",
        "Length in tokens",
        f"The selection holds {totals[1]:,} of the pool's {totals[0]:,} tokens "
        f"({percent(totals[1] / max(totals[0], 1))}).",
        figures.key(_KEY),
        panel(medians[0].upper() + medians[1:], drawn),
    )


def _score_panel(task: str, values: Float[np.ndarray, " n"], choice: Choice) -> Markup:
    is_finite = np.isfinite(values)
    finite = values[is_finite]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    scale = figures.Scale(low, high) if high > low else figures.Scale(low - 0.5, high + 0.5)
    edges = np.linspace(scale.low, scale.high, 61)
    chosen_finite = values[choice.is_chosen & is_finite]
    cutoff = scale(float(chosen_finite.min())) if len(chosen_finite) else None
    rows: list[list[Child]] = []
    for label, members in choice.groups():
        inside = members & is_finite
        everyone = np.histogram(values[inside], edges)[0].astype(np.float64)
        picked = np.histogram(values[inside & choice.is_chosen], edges)[0].astype(np.float64)
        n, k = int(members.sum()), int((members & choice.is_chosen).sum())
        middle = decimal(float(np.median(values[inside]))) if inside.any() else "none"
        title = f"{label}: median score {middle}, {k} of {n} chosen"
        rows.append(
            [
                _source(label),
                figures.ridge(everyone, picked, cutoff, title),
                join([tag("b", f"{k:,}"), tag("span", f" of {n:,}", class_="soft")]),
            ]
        )
    notes: list[str] = []
    if cutoff is not None:
        notes.append(f"Dashed: the lowest chosen score, {decimal(float(chosen_finite.min()))}.")
    if (n_last := int((~is_finite).sum())) > 0:
        notes.append(f"{count(n_last, 'example')} without a finite score (ranked last) not drawn.")
    drawn = join([drawn_rows(rows, figures.axis(scale), class_="rows ridges")])
    if task:
        return panel(f"For {task}", drawn, note=" ".join(notes))
    return join([drawn, tag("p", " ".join(notes), class_="note") if notes else None])


def _twin_histogram(
    values: Float[np.ndarray, " n"],
    choice: Choice,
    what: str,
    scale: figures.Scale,
    *,
    last: str = "",
) -> tuple[Markup, str]:
    is_finite = np.isfinite(values)
    # Few chosen examples would look like a comb in narrow bins.
    n_bins = 20 if choice.is_chosen.sum() < 200 else 40
    edges = np.linspace(scale.low, scale.high, n_bins + 1)
    groups = {"pool": is_finite, "selected": is_finite & choice.is_chosen}
    shares = {
        name: np.histogram(values[members], edges)[0] / max(int(members.sum()), 1)
        for name, members in groups.items()
    }
    medians = ", ".join(
        f"{_KEY[name]} {_short(float(np.median(values[members])))}"
        for name, members in groups.items()
        if members.any()
    )
    words = f"median: {medians}"
    return figures.histograms(shares, scale, f"{what}, {words}", last=last), words


def _source(label: str, columns: int = 26) -> Markup:
    return tag("bdi", shortened(label, columns), title=label)


def _lift(chosen: float, pool: float) -> str:
    return f"× {chosen / pool:.2f}" if pool else "–"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else decimal(value)


def _more(n: int, what: str) -> Markup | None:
    if n <= _SHOWN_TASKS:
        return None
    return tag("p", f"The first {_SHOWN_TASKS} of {n} {what} are drawn.", class_="note")
