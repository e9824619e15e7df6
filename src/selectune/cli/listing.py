"""Lists that come from the registry and the schema, never from memory."""

import textwrap
from dataclasses import dataclass
from typing import Any

from selectune import registry
from selectune.errors import TOLD, ConfigError, nearest
from selectune.recipe import describe, describe_owner
from selectune.recipe.words import option_rows


@dataclass(frozen=True, slots=True)
class Listing:
    """Something that is only printed."""

    data: dict[str, Any]
    text: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return self.data

    def lines(self) -> tuple[str, ...]:
        """Return it as lines for a person."""
        return self.text


def keys() -> Listing:
    """Return every key of a recipe, with type, default and meaning."""
    rows = [*describe(), *describe_owner()]
    names = ("key", "type", "default", "description")
    text: list[str] = []
    for key, kind, default, description in rows:
        text += _wrap(f"{kind}; {default}", f"{key}: ", 8)
        text += _wrap(description, " " * 4, 4)
    return Listing({"keys": [dict(zip(names, row, strict=True)) for row in rows]}, tuple(text))


_FAMILIES: tuple[tuple[registry.Family, str], ...] = (
    ("data_scorer", "score.method"),
    ("selection_rule", "select.rule"),
    ("training_method", "tune.method"),
    ("row_picker", "tune.options.pick"),
    ("weight_scorer", "tune.weights.method"),
    ("compressor", "emulate.method"),
)


def methods() -> Listing:
    """Return every method, one line each."""
    data: dict[str, Any] = {}
    text: list[str] = []
    for family, key in _FAMILIES:
        entries = registry.methods(family)
        data[family] = [_facts(entry) for entry in entries]
        width = max((len(entry.name) for entry in entries), default=0)
        text.append(f"{family.replace('_', ' ')}s ({key})")
        for entry in entries:
            needs = f"  [{', '.join(sorted(entry.needs))}]" if entry.needs else ""
            text += _wrap(entry.summary + needs, f"  {entry.name:<{width}}  ", width + 4)
        text.append("")
    text.append("[...] says what a method needs beside the tokens.")
    text.append("`selectune methods NAME` tells options, cost and when it disappoints.")
    return Listing(data, tuple(text))


def method(name: str) -> Listing:
    """Return one method in full, and those of the same name in other families.

    Raises:
        ConfigError: no method of that name.
    """
    every = [(e, key) for family, key in _FAMILIES for e in registry.methods(family)]
    known = dict.fromkeys(e.name for e, _ in every)
    if name not in known:
        raise ConfigError(
            f'"{name}" is no method',
            where="command line",
            why=f"known are: {', '.join(known)}",
            do=nearest(name, known, instead=TOLD),
        )
    same = [(e, key) for e, key in every if e.name == name]
    first, *others = [_facts(e) for e, _ in same]
    text: list[str] = []
    for entry, place in same:
        text += [*([""] if text else []), *_in_full(entry, place if others else "")]
    return Listing({**first, "others": others}, tuple(text))


def _in_full(entry: registry.Entry, place: str) -> list[str]:
    facts = _facts(entry)
    text = [f"{entry.name}{f' ({place})' if place else ''}: {entry.summary}"]
    for key in ("paper", "cost", "fails"):
        text += _wrap(facts[key], f"  {key + ':':<7} ", 10)
    text.append("  options:" if facts["options"] else "  options: none")
    for option in facts["options"]:
        text += _wrap(f"{option['type']}; {option['default']}", f"    {option['key']}: ", 8)
        text += _wrap(option["description"], " " * 8, 8)
    return text


def _wrap(text: str, first: str, indent: int) -> list[str]:
    """Return a paragraph as lines of at most 100 columns, nothing for no text."""
    return textwrap.wrap(
        text, 100, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def _facts(entry: registry.Entry) -> dict[str, Any]:
    names = ("key", "type", "default", "description")
    return {
        "name": entry.name,
        "family": entry.family,
        "summary": entry.summary,
        "needs": sorted(entry.needs),
        "paper": entry.paper,
        "cost": entry.cost,
        "fails": entry.fails,
        "options": [dict(zip(names, row, strict=True)) for row in option_rows(entry.options)],
    }
