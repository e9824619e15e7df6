"""One decorator per method family; help, docs table, error lists and test matrix come from here."""

import functools
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from selectune.errors import TOLD, ConfigError, nearest

Family = Literal[
    "data_scorer", "selection_rule", "training_method", "row_picker", "weight_scorer", "compressor"
]
WeightNeed = Literal["mean_gradient", "square_gradient", "first_gradient", "drift"]
CompressorNeed = Literal["gradients", "sampled_labels", "inputs", "hidden_states", "distillation"]
Need = (
    Literal["losses", "gradients", "checkpoints", "file", "score", "norm2", "gram"]
    | WeightNeed
    | CompressorNeed
)
Function = TypeVar("Function", bound=Callable[..., Any])
Method = TypeVar("Method")

# The packages whose import registers the methods of a family.
_HOMES: dict[Family, tuple[str, ...]] = {
    "data_scorer": ("selectune.methods.data",),
    "selection_rule": ("selectune.methods.rules",),
    "training_method": (
        "selectune.methods.layers",
        "selectune.methods.data_layer",
        "selectune.methods.sparse",
    ),
    "row_picker": ("selectune.methods.data_layer",),
    "weight_scorer": ("selectune.methods.weights",),
    "compressor": ("selectune.methods.compressors",),
}
# Families of which one file may hold several: their summary stands in the function's docstring.
_SEVERAL_IN_A_FILE = frozenset({"selection_rule", "row_picker", "training_method"})
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SECTION = re.compile(r"^(Paper|Cost|Fails)\s+(.*(?:\n\s{2,}.*)*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a method that has none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered method and what its file says about it."""

    name: str
    family: Family
    options: type
    function: Callable[..., Any]
    needs: frozenset[Need]

    def _document(self) -> str:
        return sys.modules[self.function.__module__].__doc__ or ""

    def _section(self, name: str) -> str:
        found = {m[1]: " ".join(m[2].split()) for m in _SECTION.finditer(self._document())}
        return found.get(name, "")

    @property
    def summary(self) -> str:
        """The first line of the method's file; of its function where a file holds several."""
        own = self.function.__doc__ or ""
        text = own if self.family in _SEVERAL_IN_A_FILE else self._document()
        return text.strip().split("\n", 1)[0]

    @property
    def formula(self) -> str:
        """What stands between the first line of the method's file and its sections.

        Empty where a file holds several methods: it is then about all of them.
        """
        same = [e for e in _entries[self.family].values() if e._document() == self._document()]
        if len(same) > 1:
            return ""
        body = self._document().partition("\n")[2]
        first = _SECTION.search(body)
        return (body[: first.start()] if first else body).strip("\n")

    @property
    def paper(self) -> str:
        """Where the method comes from."""
        return self._section("Paper")

    @property
    def cost(self) -> str:
        """What it costs in time and memory."""
        return self._section("Cost")

    @property
    def fails(self) -> str:
        """When it disappoints."""
        return self._section("Fails")

    @property
    def required(self) -> tuple[str, ...]:
        """The options that have no default."""
        return tuple(
            f.name
            for f in fields(self.options)
            if f.default is MISSING and f.default_factory is MISSING
        )

    def parse(self, options: dict[str, Any], *, where: str = "") -> Any:  # noqa: ANN401
        """Return the options dataclass filled from plain values.

        Args:
            options: keys and plain values, as YAML or JSON gives them.
            where: file and key, for the message.

        Raises:
            ConfigError: an unknown key, a wrong type or a value out of range.
        """
        names = [f.name for f in fields(self.options)]
        for key in options:
            if key not in names:
                raise ConfigError(
                    f'"{key}" is no option of {self.name}',
                    where=where,
                    why=f"{self.name} takes: {', '.join(names) or 'no options'}",
                    do=nearest(key, names) if names else f'remove "{key}"',
                )
        try:
            return TypeAdapter(self.options).validate_python(options)
        except ValidationError as error:
            # What is wrong goes before what is not there.
            found = sorted(error.errors(), key=lambda e: e["type"] == "missing")
            first, key = found[0], found[0]["loc"][:1]
            if first["type"] == "missing":
                raise ConfigError(
                    f'{self.name} needs the option "{key[0]}"',
                    where=where,
                    why="it has no default",
                    do=f"add {key[0]}; `selectune methods {self.name}` tells what it takes",
                ) from error
            # A share or a number: each reading has a complaint of its own.
            reasons = dict.fromkeys(e["msg"] for e in found if e["loc"][:1] == key)
            raise ConfigError(
                f'option "{"".join(map(str, key))}" of {self.name} cannot be {first["input"]!r}',
                where=where,
                why="; or ".join(reasons),
                do="correct the value; `selectune methods` lists options and defaults",
            ) from error


_entries: dict[Family, dict[str, Entry]] = {family: {} for family in _HOMES}


def register(
    family: Family, name: str, *, options: type, needs: frozenset[Need] = frozenset()
) -> Callable[[Function], Function]:
    """Return the decorator that adds one method to its family.

    Raises:
        ValueError: the name is malformed or taken, or `options` is not a frozen dataclass
            (mistakes of the method's author, found at import).
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"method name {name!r} must match {_NAME.pattern}")
    if name in _entries[family]:
        raise ValueError(f"{family} {name!r} is registered twice")
    if not is_dataclass(options):
        raise ValueError(f"options of {family} {name!r} must be a dataclass")

    def add(function: Function) -> Function:
        _entries[family][name] = Entry(name, family, options, function, needs)
        return function

    return add


def data_scorer(
    name: str, *, options: type, needs: set[Need] | None = None
) -> Callable[[Function], Function]:
    """Register a scorer of pool examples: (evidence, options) -> Scores.

    Args:
        name: what a recipe calls it.
        options: a frozen dataclass whose defaults are the paper's.
        needs: what it reads beside the tokens: "losses" (one forward pass of the base),
            "gradients" (the store of one gradient pass: the dot product of every pool example with
            every target), "checkpoints" (several such passes: its options are `ReadsCheckpoints`),
            "hidden_states" (one forward pass of the base over pool and targets), "file" (the one
            that its option `path` names; a run then guards it).
    """
    return register("data_scorer", name, options=options, needs=frozenset(needs or ()))


def selection_rule(name: str, *, options: type) -> Callable[[Function], Function]:
    """Register a rule that turns scores and a budget into chosen ids."""
    return register("selection_rule", name, options=options)


def row_picker(name: str, *, needs: set[Need] | None = None) -> Callable[[Function], Function]:
    """Register a picker: what one layer knows of a batch -> how much each example counts there.

    Args:
        name: what `pick` calls it.
        needs: what it reads: "score", "norm2", "gram". Nothing else is computed.
    """
    return register("row_picker", name, options=NoOptions, needs=frozenset(needs or ()))


def training_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method that acts during training: a frozen dataclass of its options.

    Its options are checked where it is made, in Python as in a recipe.
    """

    def add(method: type[Method]) -> type[Method]:
        register("training_method", name, options=method)(method)
        _check_when_made(_entries["training_method"][name])
        return method

    return add


def weight_scorer(
    name: str, *, needs: set[WeightNeed] | None = None
) -> Callable[[type[Method]], type[Method]]:
    """Register a scorer of single weights: a frozen dataclass of its options.

    Its options are checked where it is made, in Python as in a recipe.

    Args:
        name: what a recipe calls it.
        needs: what it reads beside the weights, per tensor: "mean_gradient" of the example losses,
            "square_gradient" (the mean of squares), "first_gradient" (of one micro-batch), "drift"
            (what full fine-tuning changed). Nothing else is computed.
    """

    def add(method: type[Method]) -> type[Method]:
        register("weight_scorer", name, options=method, needs=frozenset(needs or ()))(method)
        _check_when_made(_entries["weight_scorer"][name])
        return method

    return add


def compressor(
    name: str, *, needs: set[CompressorNeed] | None = None
) -> Callable[[type[Method]], type[Method]]:
    """Register a compressor of middle layers: a frozen dataclass of its options.

    Its options are checked where it is made, in Python as in a recipe.

    Args:
        name: what a recipe calls it.
        needs: what it reads beside the weights: "gradients" (second moments of inputs and output
            gradients, and the weight gradients), "inputs" (second moments of the inputs alone: a
            forward pass), "hidden_states" (of every middle layer, pooled over each example);
            "distillation" says that what it leaves is trained afterwards.
    """

    def add(method: type[Method]) -> type[Method]:
        register("compressor", name, options=method, needs=frozenset(needs or ()))(method)
        _check_when_made(_entries["compressor"][name])
        return method

    return add


def entry_of(family: Family, options: type) -> Entry:
    """Return what is registered with these options."""
    return next(entry for entry in methods(family) if entry.options is options)


def _check_when_made(entry: Entry) -> None:
    """Let the dataclass of an entry refuse wrong options, which dataclasses by themselves do not.

    `Entry.parse` makes its instances without `__init__`, so nothing is checked twice.
    """
    plain = entry.options.__init__

    @functools.wraps(plain)
    def checked(self: Any, *args: Any, **options: Any) -> None:  # noqa: ANN401
        plain(self, *args, **options)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        parsed = entry.parse(given, where=entry.options.__name__)
        for key in given:  # a frozen dataclass lets nobody else do this
            object.__setattr__(self, key, getattr(parsed, key))

    entry.options.__init__ = checked


def methods(family: Family) -> list[Entry]:
    """Return every method of a family, by name."""
    for home in _HOMES[family]:
        importlib.import_module(home)
    return [_entries[family][name] for name in sorted(_entries[family])]


def get(family: Family, name: str, *, where: str = "") -> Entry:
    """Return one method.

    Raises:
        ConfigError: no method of that name; the message offers the nearest.
    """
    known = {entry.name: entry for entry in methods(family)}
    if name not in known:
        raise ConfigError(
            f'"{name}" is no {family.replace("_", " ")}',
            where=where,
            why=f"known are: {', '.join(known)}",
            do=nearest(name, known, instead=TOLD),
        )
    return known[name]
