"""Which weights train: how many and where, what kind, in common with whom, at what price."""

from selectune.report.blocks import folded, isolated, section
from selectune.report.markup import Markup, join, tag
from selectune.report.weight_density import density
from selectune.report.weight_facts import WeightFacts
from selectune.report.weight_overlap import shared
from selectune.report.weight_plane import plane
from selectune.report.weight_transfer import transfer


def trained(facts: WeightFacts | None) -> Markup | None:
    """Return the part of the page on single weights; None where there is nothing to tell."""
    if facts is None:
        return None
    arms = [(join(["Arm: ", isolated(f.arm)]), density(f)) for f in facts.chosen]
    parts = [
        *(tag("div", tag("h3", name), body, class_="task") for name, body in arms[:1]),
        *(folded(name, body) for name, body in arms[1:]),
        None if facts.plane is None else plane(facts.plane),
        shared(facts.shared),
        transfer(facts.transfers),
    ]
    if not any(parts):
        return None
    return section(
        "weights",
        "Which weights train",
        "Single weights of the base were chosen before training; all others stay as they are, bit "
        "for bit.",
        *parts,
    )
