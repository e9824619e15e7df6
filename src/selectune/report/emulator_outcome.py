"""The first things on an emulator's page: what goes out, what it is worth, how true it is."""

from collections.abc import Mapping
from typing import Any

from selectune.report import figures
from selectune.report.blocks import bullets, drawn_rows, isolated, listed, panel, section, table
from selectune.report.emulator_facts import EmulatorFacts
from selectune.report.emulator_map import layers_in_words
from selectune.report.markup import Child, Markup, join, shortened, tag
from selectune.report.numbers import count, decimal, duration, percent, size


def verdict(facts: EmulatorFacts) -> Markup:
    """Return what goes out in one sentence, the numbers behind it, and what to beware of."""
    beware = _beware(facts)
    return tag(
        "header",
        tag("p", "selectune emulator", class_="kicker"),
        tag("h1", title(facts), dir="auto"),
        tag("p", "This page stays with the model's owner: it says what was taken out of the model. "
            "The package alone goes out.", class_="gap"),
        tag(
            "div",
            tag("p", _headline(facts), class_="headline"),
            tag("p", _numbers(facts), class_="numbers"),
            class_="verdict bad" if beware else "verdict even",
        ),
        tag("div", tag("h2", "Beware"), bullets(beware), class_="advice") if beware else None,
        at_a_glance(facts),
    )  # fmt: skip


def title(facts: EmulatorFacts) -> str:
    """Return what the page is called."""
    return f"An emulator made by {facts.about['method']}"


def at_a_glance(facts: EmulatorFacts) -> Markup:
    """Return how the emulator was made, in a handful of facts."""
    about, ratios = facts.about, facts.quality["ratios"]
    options = ", ".join(f"{name} {value}" for name, value in about["options"].items())
    cost = about["cost"]
    pairs: dict[str, str] = {
        "Compressor": f"{about['method']}{f' ({options})' if options else ''}",
        "Asked to keep": f"{percent(about['keep_attention'])} of attention, "
        f"{percent(about['keep_mlp'])} of the MLPs, {about['budget']} budget",
        "Size": f"{ratios['n_emulator']:,} of {ratios['n_original']:,} parameters",
        "Compressed by": f"{count(about['n_blocks'], 'block')} of {about['block_tokens']} tokens",
        "Cost": f"{duration(cost['seconds'])}, peak {size(cost['peak_bytes'])}",
        "Seed": f"{about['seed']}",
        "Id of the package": facts.package,
    }
    rows = [tag("div", tag("dt", a), tag("dd", isolated(b))) for a, b in pairs.items()]
    return tag("dl", *rows, class_="glance")


def by_itself(facts: EmulatorFacts) -> Markup:
    """Return what the emulator can do without its model, and that model beside it."""
    quality = facts.quality
    losses: Mapping[str, float] = quality["losses_nats"]
    healed: float | None = quality["healed_loss_nats"]
    rows: list[list[Child]] = [_row("Loss on the probe", "nats per token", losses)]
    if healed is not None:
        mended = {"emulator": healed, "original": losses["original"]}
        rows.append(_row("Loss after healing", "its middle trained on generic text", mended))
    for task, answers in quality["answers"].items():
        name, n = shortened(task, 40), count(answers["emulator"]["n"], "question")
        one, other = _accuracies(answers)
        if one is not None and other is not None:
            difference = f"{100 * (one - other):+.1f} points".replace("-", "−")
            label = _label(join(["Accuracy on ", isolated(name)]), n)
            rows.append([label, percent(one), percent(other), difference])
        loss = {who: answers[who]["answer_loss"] for who in ("emulator", "original")}
        if all(value is not None for value in loss.values()):
            rows.append(_row(join(["Answer loss on ", isolated(name)]), n, loss))
    return section(
        "alone",
        "What the emulator is worth by itself",
        "Whoever has the package can use the emulator as it is. The further it falls behind the "
        "model, the less was given away.",
        table(["", "Emulator", "Model", "Emulator − model"], rows, class_="plain"),
        tag("p", f"Their predictions are {decimal(quality['divergence_nats'])} nats per token "
            "apart (mean KL from model to emulator).", class_="note"),
    )  # fmt: skip


def gradients(facts: EmulatorFacts) -> Markup:
    """Return how true the training signal is, over all layers that train and for each."""
    found: Mapping[str, Any] = facts.quality["gradients"]
    total = {name: found[name] for name in ("cosine", "relative_error")}
    every: Mapping[str, Mapping[str, float]] = {"all together": total} | {
        f"layer {j}": one
        for j, one in sorted(found["by_layer"].items(), key=lambda pair: int(pair[0]))
    }
    cosines = figures.Scale(min(0.0, *(one["cosine"] for one in every.values())), 1.0)
    most = max(1.0, *(one["relative_error"] for one in every.values()))
    errors = figures.Scale(0.0, most)
    return section(
        "gradients",
        "How true the gradients are",
        "Gradients of the layers that train, in the emulator and in the model, on the same "
        "examples. The data owner trains by the emulator's: the nearer they are to the model's, "
        "the better the tuned layers fit back.",
        tag(
            "div",
            panel("Cosine, 1 is the same direction", _dots(every, "cosine", cosines, 1)),
            panel("Relative error, 0 is the same",
                  _dots(every, "relative_error", errors, 0)),
            class_="pair",
        ),
    )  # fmt: skip


def protection() -> Markup:
    """Return what an emulator protects, in short."""
    return section(
        "protection",
        "What this protects, and what it does not",
        "An emulator is a worse model, not a hidden one.",
        bullets(
            [
                "The data owner never receives the whole model, and you never see the data.",
                "Embeddings, head, last norm and the layers that train go out exactly. Kept "
                "channels are exact rows of your weights, kept components true singular "
                "directions.",
                "Who has generic text and computing time can train the middle and win back a part "
                "of it. If the model is public, nothing is hidden at all.",
                "Tuned layers that come back may remember the data they were tuned on, and may "
                "hold a backdoor: they are checked for form, not for intent. Evaluate the plugged "
                "model before you use it.",
            ]
        ),
        tag("p", "In full: ", tag("code", "LIMITATIONS.md"),
            ", “What offsite tuning protects, and what it does not”.", class_="note"),
    )  # fmt: skip


def _headline(facts: EmulatorFacts) -> str:
    n_others = len(facts.middle)
    whole = facts.adapters
    go = f"{'Layer' if len(whole) == 1 else 'Layers'} {layers_in_words(whole)} "
    go += "goes out whole" if len(whole) == 1 else "go out whole"
    share = f"{percent(facts.quality['ratios']['middle'])} of {_their(n_others)} parameters"
    if facts.cuts:
        return f"{go}, the other {n_others} at {share}."
    n = {fate: sum(facts.fate(j) == fate for j in facts.middle) for fate in ("whole", "shared")}
    n_gone = n_others - sum(n.values())
    fates = [f"{n['whole']} stay"]
    fates += [f"{n['shared']} run the weights of one of these"] if n["shared"] else []
    fates += [f"{n_gone} {'is' if n_gone == 1 else 'are'} left out"] if n_gone else []
    return f"{go}; of the other {n_others}, {listed(fates)}: {share}."


def _their(n: int) -> str:
    return "its" if n == 1 else "their"


def _numbers(facts: EmulatorFacts) -> str:
    quality = facts.quality
    losses, found = quality["losses_nats"], quality["gradients"]
    first = (
        "" if facts.package_bytes is None else f"The package takes {size(facts.package_bytes)}. "
    )
    answers = [
        f"{percent(one)} of {shortened(task, 40)} right, the model {percent(other)}"
        for task, by_model in quality["answers"].items()
        for one, other in [_accuracies(by_model)]
        if one is not None and other is not None
    ]
    alone = f"By itself it has a loss of {decimal(losses['emulator'])} nats per token on the probe"
    alone += f" where the model has {decimal(losses['original'])}"
    alone += f", and answers {'; '.join(answers)}" if answers else ""
    return (
        f"{first}{alone}. The gradients of the layers that train keep a cosine of "
        f"{found['cosine']:.3f} with the model's (1 is the same), with a relative error of "
        f"{found['relative_error']:.3f} (0 is the same)."
    ).replace("-", "−")


def _beware(facts: EmulatorFacts) -> list[Child]:
    """Return where an emulator gives the model away, or trains by a gradient that is not it."""
    quality = facts.quality
    found: list[Child] = []
    losses = quality["losses_nats"]
    if losses["emulator"] <= losses["original"]:
        found.append(
            "By itself the emulator is no worse than the model on the probe: either it gives the "
            "model away, or the probe tells too little. Probe it with questions of your own, and "
            "keep less."
        )
    healed = quality["healed_loss_nats"]
    if healed is not None and losses["emulator"] > losses["original"] >= healed:
        found.append(
            "After a little training on generic text the emulator is as good as the model."
        )
    if quality["gradients"]["relative_error"] >= 1:
        found.append(
            "The error of the gradients is as large as the gradients, or larger: what is tuned on "
            "this emulator may not help the model. Keep more, or let more layers train."
        )
    return found


def _row(label: Child, unit: str, values: Mapping[str, float]) -> list[Child]:
    one, other = values["emulator"], values["original"]
    difference = f"{one - other:+.2f}".replace("-", "−")
    return [_label(label, unit), decimal(one), decimal(other), difference]


def _label(label: Child, unit: str) -> Markup:
    return join([label, tag("span", unit, class_="unit")])


def _accuracies(answers: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, float | None]:
    return answers["emulator"]["accuracy"], answers["original"]["accuracy"]


def _dots(
    every: Mapping[str, Mapping[str, float]], name: str, scale: figures.Scale, same: int
) -> Markup:
    rows: list[list[Child]] = []
    for label, one in every.items():
        words = f"{one[name]:.3f}".replace("-", "−")
        class_ = "selected" if label == "all together" else "base"
        mark = figures.whisker(scale, one[name], None, class_, f"{label}: {words}", zero=same)
        rows.append([tag("b", label) if class_ == "selected" else label, mark, words])
    return drawn_rows(rows, figures.axis(scale))
