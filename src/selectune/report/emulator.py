"""One page per emulator, for the owner of its model: what goes out, what it is worth, and why."""

from pathlib import Path

from selectune.files import write_file
from selectune.report import emulator_map, emulator_outcome, emulator_scores
from selectune.report.emulator_facts import EmulatorFacts
from selectune.report.markup import join, tag
from selectune.report.page import document

NAME = "report.html"
_SHEETS = ("style", "layers", "weights", "emulator")
_ANCHORS = {
    "By itself": "alone",
    "What goes out": "map",
    "Scores": "scores",
    "Gradients": "gradients",
    "Protection": "protection",
}


def write_emulator_report(owner: Path, facts: EmulatorFacts) -> Path:
    """Write the page into the owner's folder; an older one is replaced in one step.

    Args:
        owner: the folder that stays; a place that cannot be written is a StorageError.
        facts: what to show.

    Returns:
        The path of the page.
    """
    path = owner / NAME
    write_file(path, render(facts).encode())
    return path


def render(facts: EmulatorFacts) -> str:
    """Return the page; equal facts give equal text."""
    sections = {
        "By itself": emulator_outcome.by_itself(facts),
        "What goes out": emulator_map.going_out(facts),
        "Scores": emulator_scores.scores(facts),
        "Gradients": emulator_outcome.gradients(facts),
        "Protection": emulator_outcome.protection(),
    }
    links = [tag("a", name, href=f"#{_ANCHORS[name]}") for name, body in sections.items() if body]
    return document(
        emulator_outcome.title(facts),
        _SHEETS,
        emulator_outcome.verdict(facts),
        tag("nav", join(links), aria_label="Contents"),
        *sections.values(),
    )
