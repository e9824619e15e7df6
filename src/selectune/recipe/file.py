"""The YAML of a recipe as plain values that remember where they stand.

A small YAML: mappings, lists, text, numbers, true, false and null, as in YAML 1.2. `1e-4` is a
number, `no` and `on` are text. Tags, aliases and repeated keys are refused: they let a file run
code, explode in memory, or say two things at once.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from selectune.errors import ConfigError, nearest

Key = str | int
Where = tuple[Key, ...]

MAX_BYTES = 256 * 1024  # a recipe is a page of text; PyYAML reads about 1 MB/s
MAX_DEPTH = 20  # the composer recurses, so deep nesting would end in a RecursionError
MAX_DIGITS = 30

# (tag, pattern, first characters) of YAML 1.2's core schema. PyYAML's own are YAML 1.1's, where
# `1e-4` is text, `no` is false and `1:30` is ninety.
_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"]),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        [*"-+.0123456789"],
    ),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without tags, aliases and deep nesting."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = cast(Any, self.peek_event())  # pyright: ignore[reportUnknownMemberType]
        mark = event.start_mark
        if isinstance(event, yaml.events.AliasEvent):
            raise _Refused(mark, f"the alias *{event.anchor}", "write the value out in full")
        if event.tag is not None:
            raise _Refused(mark, f"the tag {event.tag}", "write the plain value")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused(mark, f"nesting deeper than {MAX_DEPTH} levels", "flatten it")
        node = super().compose_node(parent, cast(int, index))
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes the text that `_Loader` would take for a number."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, _pattern, _first)  # pyright: ignore[reportUnknownMemberType]


class _Refused(Exception):  # noqa: N818  (never leaves this file)
    """Valid YAML that a recipe may not hold."""

    def __init__(self, mark: yaml.Mark, what: str, do: str) -> None:
        self.line, self.what, self.do = mark.line + 1, what, do
        super().__init__(what)


@dataclass
class Tree:
    """Plain values of a recipe, and where each came from.

    Args:
        data: mappings, lists and scalars.
        origins: what to call the place of a value, such as "demo.yaml line 14".
        name: what to call the whole.
    """

    data: dict[str, Any]
    origins: dict[Where, str]
    name: str

    def to_json(self) -> str:
        """Return the values as JSON (with NaN and Infinity, which the schema refuses)."""
        return json.dumps(self.data)

    def where(self, path: Where) -> str:
        """Return the key and the place of a value, or of the nearest value around it."""
        for n in range(len(path), -1, -1):
            place = self.origins.get(path[:n])
            if place is not None:
                break
        else:
            place = self.name
        if place.startswith("command line"):
            return place
        return f"{dotted(path)}, {place}" if path else place

    def has(self, path: Where) -> bool:
        """Return whether the tree holds a value at this path."""
        node: object = self.data
        for key in path:
            if isinstance(node, list):
                node = dict(enumerate(cast(list[object], node)))
            if not isinstance(node, dict) or key not in node:
                return False
            node = cast(dict[Key, object], node)[key]
        return True

    def get(self, path: Where) -> object:
        """Return the value at a path that `has` found."""
        node: Any = self.data
        for key in path:
            node = node[key]
        return node

    def put(self, path: Where, value: object, place: str) -> None:
        """Set a value, making the mappings on the way to it.

        Raises:
            ConfigError: something on the way is no mapping.
        """
        node = self.data
        for n, key in enumerate(path[:-1], start=1):
            below: object = node.get(str(key))
            if below is None:
                below = node[str(key)] = dict[str, Any]()
            if not isinstance(below, dict):
                raise ConfigError(
                    f"{dotted(path)} cannot be set",
                    where=place,
                    why=f"{dotted(path[:n])} holds {short(below)}, which has no keys below it",
                    do=f"set {dotted(path[:n])} itself, or make it a mapping in the recipe",
                )
            node = cast(dict[str, Any], below)
        node[str(path[-1])] = value
        for old in [o for o in self.origins if o[: len(path)] == path]:
            del self.origins[old]
        self.origins[path] = place

    def override(self, text: str) -> None:
        """Set a value as the command line asks: `section.key=value`.

        Raises:
            ConfigError: no `=`, an empty key, or a value that is no YAML.
        """
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(
                f'"{text}" is no override',
                where=f"command line, {text}",
                why="after the recipe come overrides, written section.key=value",
                do="for example tune.epochs=2 (no spaces around =)",
            )
        place = f"command line, {text}"
        self.put(path, _parse(value, place, f"{place}:").data, place)


@dataclass
class _Parsed:
    data: object
    lines: dict[Where, int]


def dotted(path: Where) -> str:
    """Return a path as a person writes it: data.pool[0]."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def short(value: object) -> str:
    """Return a value as YAML on one line, cut at 60 characters."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    if isinstance(value, str):
        text = f'"{value}"'
    return text if len(text) <= 60 else text[:57] + "..."


def dump_yaml(data: dict[str, Any]) -> str:
    """Return values as YAML that `read_tree` reads back to the same values."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=100,
    )


def read_tree(path: Path) -> Tree:
    """Read a recipe file.

    Raises:
        ConfigError: no such file, not a text file, not YAML, or YAML that a recipe may not hold.
    """
    text = _read_text(path)
    parsed = _parse(text, path.name, f"{path.name} line")
    data = parsed.data
    if data is None:
        raise ConfigError(
            "the recipe is empty",
            where=str(path),
            why="a recipe names at least model.base, data.pool and data.target",
            do="`selectune methods --keys` lists every key",
        )
    if not isinstance(data, dict):
        raise ConfigError(
            f"the recipe holds {short(data)} instead of sections",
            where=str(path),
            why="a recipe is a mapping: a line `model:`, and below it, indented, `base: ...`",
            do="is this the file you meant?",
        )
    lines = {key: f"{path.name} line {line}" for key, line in parsed.lines.items()}
    return Tree(cast(dict[str, Any], data), lines, path.name)


def _read_text(path: Path) -> str:
    if path.is_dir():
        recipes = sorted(p.name for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        raise ConfigError(
            f'"{path}" is a folder, and a recipe is a file',
            where="command line",
            why=f"the folder holds {', '.join(recipes[:5])}" if recipes else "it holds no recipe",
            do=f"name the file: {path / recipes[0]}" if recipes else "name a .yaml file",
        )
    if not path.exists():
        raise _missing(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f'the recipe "{path}" cannot be read',
            where="command line",
            why=str(error.strerror),
            do="check the rights of the file",
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"the recipe is larger than {MAX_BYTES // 1024} kB",
            where=str(path),
            why="a recipe is a page of text; data files are named in it, not written into it",
            do="is this the file you meant?",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            "the recipe is not UTF-8 text",
            where=f"{path.name} line {line}",
            why=f"byte {raw[error.start]:#04x} cannot be read",
            do="save the file as UTF-8",
        ) from error


def _missing(path: Path) -> ConfigError:
    if "=" in path.name:
        return ConfigError(
            f'"{path}" stands where the recipe belongs',
            where="command line",
            why="the recipe comes first, the overrides after it",
            do=f"selectune VERB recipe.yaml {path}",
        )
    beside: list[str] = []
    if path.parent.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    if path.name + ".yaml" in beside:
        do = f'did you mean "{path}.yaml"?'
    elif beside:
        do = nearest(path.name, beside)
    else:
        do = "name a recipe that exists; `selectune demo` runs one that ships with selectune"
    return ConfigError(
        f'there is no recipe "{path}"', where="command line", why="no such file", do=do
    )


def _parse(text: str, name: str, line_name: str) -> _Parsed:
    """Return the values of one YAML document, and their lines.

    Args:
        text: the document.
        name: what to call it in an error.
        line_name: what stands before a line number in an error.
    """

    def at(line: int) -> str:
        return name if name.startswith("command line") else f"{line_name} {line}"

    try:
        loader = _Loader(text)
        parsed = _Parsed(None, {})
        node = loader.get_single_node()
        if node is not None:
            parsed.data = _plain(node, (), parsed.lines)
        return parsed
    except _Refused as error:
        raise ConfigError(
            f"a recipe may not hold {error.what}",
            where=at(error.line),
            why="a recipe is plain values, each said once",
            do=error.do,
        ) from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"character {error.character!r} cannot stand in a recipe",
            where=name,
            why=str(error.reason),
            do="is this a text file?",
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        indent = re.match(r"\s*", ([*text.split("\n"), ""])[line - 1])
        if indent and "\t" in indent[0]:
            raise ConfigError(
                "this line is indented with a tab",
                where=at(line),
                why="YAML takes spaces only",
                do="replace each tab by two spaces",
            ) from None
        raise ConfigError(
            "this is not YAML",
            where=at(line),
            why=", ".join(part for part in (error.context, error.problem) if part),
            do="quote text that holds : # [ ] { } or quotes, and check the indentation",
        ) from None


def _plain(node: yaml.Node, path: Where, lines: dict[Where, int]) -> object:
    """Return the value of a node, and note the lines of all that is in it."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Refused(key_node.start_mark, "a key that is no word", "use a plain name")
            key = _text(key_node)
            if key in data:
                raise _Refused(
                    key_node.start_mark,
                    f'"{dotted((*path, key))}" twice (first in line {first_lines[key]})',
                    "remove one of the two",
                )
            first_lines[key] = lines[(*path, key)] = line
            data[key] = _plain(value_node, (*path, key), lines)
        return data
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), lines) for i, item in enumerate(node.value)]
    text = _text(node)
    kind = node.tag.rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float") and len(text) > MAX_DIGITS:
        raise _Refused(node.start_mark, f"a number of {len(text)} digits", "shorten it")
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))
    return text


def _text(node: yaml.Node) -> str:
    text = str(node.value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refused(node.start_mark, "half a surrogate pair", "write the character") from None
    return text
