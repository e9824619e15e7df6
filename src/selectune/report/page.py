"""One self-contained HTML page per run, for a person who has not read the documentation.

No script, no request to anywhere: the policy in its head forbids both, and a style sheet named by
its hash is the only one that counts, so text of the pool can change nothing even if an escape were
forgotten. Escaping itself is in the types: see `selectune.report.markup`.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path

from selectune.files import write_file
from selectune.report import account, choice, heat, layers, outcome, reading, weights
from selectune.report.contents import (
    Difference,
    Level,
    Phase,
    PoolTable,
    ReportData,
    ShownExample,
    TargetSpectrum,
    TokenMap,
    TrainingFacts,
    Verdict,
    parts_of,
)
from selectune.report.markup import Child, Markup, join, tag

__all__ = [
    "Difference",
    "Level",
    "Phase",
    "PoolTable",
    "ReportData",
    "ShownExample",
    "TargetSpectrum",
    "TokenMap",
    "TrainingFacts",
    "Verdict",
    "parts_of",
    "render",
    "write_report",
]


def write_report(run_dir: Path, data: ReportData) -> Path:
    """Write `report.html` into a run directory; an older one is replaced in one step.

    Args:
        run_dir: where the run lives; a place that cannot be written is a StorageError.
        data: what to show.

    Returns:
        The path of the page.
    """
    path = run_dir / "report.html"
    write_file(path, render(data).encode())
    return path


def render(data: ReportData) -> str:
    """Return the page; equal data gives equal text."""
    chosen = choice.Choice.of(data)
    sections = {
        "Evaluation": outcome.evaluation(data),
        "Chosen": choice.composition(data, chosen) if len(data.pool.ids) else None,
        "Scores": choice.scores(data, chosen) if len(data.pool.ids) else None,
        "Target space": choice.target_space(data),
        "Captured energy": choice.energy(data, chosen),
        "Examples": reading.examples(data),
        "Tokens": heat.tokens(data),
        "Lengths": choice.lengths(data, chosen),
        "Training": account.training(data),
        "Layers": layers.trained(data),
        "Weights": weights.trained(data.weights),
        "Cost": account.cost(data),
        "Warnings": account.warnings(data),
        "Run it again": account.replay(data),
    }
    has_maps = bool(sections["Layers"] or sections["Weights"])
    return document(
        data.title,
        [
            "style",
            *(["layers"] if has_maps else []),
            *(["weights"] if sections["Weights"] else []),
            *(["tokens"] if sections["Tokens"] else []),
        ],
        outcome.verdict(data),
        account.at_a_glance(data),
        _contents(sections),
        *sections.values(),
    )


def document(title: str, sheets: Sequence[str], *body: Child) -> str:
    """Return a page that can do nothing and asks for nothing.

    Args:
        title: of the page.
        sheets: names of the style sheets in this folder.
        *body: its parts.
    """
    style = "".join(_sheet(f"{name}.css") for name in sheets)
    return "<!doctype html>\n" + tag(
        "html", _head(title, style), tag("body", tag("main", *body)), lang="en"
    )


def _sheet(name: str) -> str:
    return package_files("selectune.report").joinpath(name).read_text(encoding="utf-8")


def _head(title: str, style: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} · selectune"),
        tag("link", rel="icon", href="data:,"),  # or a browser asks the server for one
        tag("style", Markup(style)),
    )


def _contents(sections: dict[str, Markup | None]) -> Markup:
    anchors = {
        "Evaluation": "evaluation", "Chosen": "chosen", "Scores": "scores",
        "Target space": "target", "Captured energy": "energy", "Examples": "examples",
        "Tokens": "tokens", "Lengths": "lengths", "Training": "training", "Layers": "layers",
        "Weights": "weights", "Cost": "cost", "Warnings": "warnings", "Run it again": "replay",
    }  # fmt: skip
    links = [tag("a", label, href=f"#{anchors[label]}") for label, body in sections.items() if body]
    return tag("nav", join(links), aria_label="Contents")
