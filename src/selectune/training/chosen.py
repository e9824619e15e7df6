"""The training method that a recipe names, and what its results depend on."""

from dataclasses import fields, is_dataclass
from typing import Any

from selectune import registry
from selectune.data.tokens import fingerprint_of as fingerprint_of
from selectune.recipe import TuneSection
from selectune.recipe.methods import PLAIN
from selectune.training.method import Method


def chosen_method(section: TuneSection) -> Method | None:
    """Return the method of a `tune` section, None for plain training.

    Raises:
        ConfigError: no such method, or a wrong option.
    """
    if section.method == PLAIN:
        return None
    entry = registry.get("training_method", section.method, where="tune.method")
    return entry.parse(dict(section.options), where="tune.options")


def options_of(method: Method | None) -> dict[str, Any]:
    """Return a method's options by name, none for plain training."""
    if not is_dataclass(method):
        return {}
    return {field.name: getattr(method, field.name) for field in fields(method)}
