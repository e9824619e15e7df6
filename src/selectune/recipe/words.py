"""What the schema of a recipe says, in words: types, valid names, and every mistake at once."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from selectune.errors import ConfigError, nearest
from selectune.recipe.file import Tree, Where, dotted, short

Path = Where


@dataclasses.dataclass(frozen=True, slots=True)
class Like:
    """An example of text that a pattern asks for; it stands beside the pattern."""

    text: str


def is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    """Return whether a key holds a section and nothing else."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def type_words(annotation: object, metadata: Iterable[Any] = ()) -> str:
    """Return what a key takes, such as "a whole number of at least 1".

    Args:
        annotation: the type of the key.
        metadata: pydantic's constraints on it.
    """
    if _is_annotated(annotation):
        inner, *more = get_args(annotation)
        flat = [m for item in more for m in (item.metadata if _is_field(item) else [item])]
        return type_words(inner, [*metadata, *flat])
    limits = list(metadata)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [type_words(part) for part in get_args(annotation) if part is not type(None)]
        if type(None) in get_args(annotation):
            parts.append("null")
        return " or ".join(parts)
    if get_origin(annotation) is Literal:
        values = [str(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(annotation) is list:
        return f"a list of {_plural(type_words(get_args(annotation)[0]))}"
    if get_origin(annotation) is tuple:
        return f"a list of {len(get_args(annotation))} numbers"
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return "a mapping" if value is Any else f"a mapping of names to {type_words(value)}"
    if is_section(annotation):
        return f"a mapping with the keys {', '.join(annotation.model_fields)}"
    if annotation is str:
        likes = [limit.text for limit in limits if isinstance(limit, Like)]
        return f'text like "{likes[0]}"' if likes else "text"
    words: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    words[Any] = "any value"
    return words.get(annotation, str(annotation)) + _range(limits)


def rows(section: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) of every key of a section, deep."""
    found: list[tuple[str, str, str, str]] = []
    for name, info in section.model_fields.items():
        inner = _section_in(info.annotation)
        if info.description is not None:
            found.append(
                (
                    prefix + name,
                    type_words(info.annotation, info.metadata),
                    "(required)"
                    if info.is_required()
                    else short(info.default).strip('"') or "(empty)",
                    info.description,
                )
            )
        if inner is not None:
            mark = "" if is_section(info.annotation) or info.default is None else "[]"
            if get_origin(_first_list(info.annotation)) is list:
                mark = "[]"
            found += rows(inner, f"{prefix}{name}{mark}.")
    return found


def option_rows(options: type) -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) of every option of a method.

    Args:
        options: the frozen dataclass of the method, its fields Annotated with pydantic Fields.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    found: list[tuple[str, str, str, str]] = []
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        about = [m for m in get_args(hint)[1:] if _is_field(m)] if _is_annotated(hint) else []
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append(
            (
                field.name,
                type_words(hint),
                "(required)" if default is dataclasses.MISSING else short(default).strip('"'),
                next((m.description for m in about if m.description), ""),
            )
        )
    return found


def together(mistakes: Sequence[ConfigError], name: str) -> ConfigError:
    """Return one error that tells all of them."""
    if len(mistakes) == 1:
        return mistakes[0]
    blocks = "\n".join(str(mistake) for mistake in mistakes)
    return ConfigError(f"{len(mistakes)} mistakes in {name}\n{blocks}")


def mistakes(error: ValidationError, root: type[BaseModel], tree: Tree) -> list[ConfigError]:
    """Return pydantic's findings as our errors, one per key, in the order of the recipe."""
    found: dict[Path, str] = {}
    for detail in error.errors(include_url=False):
        path = _place(detail["loc"], detail["type"], tree)
        found.setdefault(path, detail["type"])
    # A union tells why each of its forms fails; what stands deepest is the real mistake.
    deepest = [p for p in found if not any(q != p and q[: len(p)] == p for q in found)]
    return [_mistake(path, found[path], root, tree) for path in deepest]


def _place(loc: tuple[int | str, ...], kind: str, tree: Tree) -> Path:
    """Return the path in the recipe; pydantic's has the names of union members in between."""
    path: Path = ()
    for i, part in enumerate(loc):
        last_of_missing = kind == "missing" and i == len(loc) - 1
        if last_of_missing or tree.has((*path, part)):
            path = (*path, part)
    return path


def _mistake(path: Path, kind: str, root: type[BaseModel], tree: Tree) -> ConfigError:
    key = dotted(path)
    annotation, info = _field(root, path)
    if kind == "extra_forbidden":
        section = _section_in(_field(root, path[:-1])[0]) if path[:-1] else root
        names = list(section.model_fields) if section else []
        home = dotted(path[:-1]) or "a recipe"
        return ConfigError(
            f'"{key}" is no key of a recipe',
            where=tree.where(path),
            why=f"{home} has the keys {', '.join(names)}",
            do=_offer(str(path[-1]), names, root, path[:-1]),
        )
    meaning = f" ({info.description})" if info is not None and info.description else ""
    metadata = info.metadata if info is not None and annotation is info.annotation else []
    expected = type_words(annotation, metadata)
    if kind == "missing":
        return ConfigError(
            f'"{key}" is missing',
            where=tree.where(path[:-1]) if path[:-1] else tree.name,
            why=f"it has no default: {expected}{meaning}",
            do=f"add {key} to the recipe, or {key}=... to the command",
        )
    value = tree.get(path)
    default = (
        "" if info is None or info.is_required() else f"; the default is {short(info.default)}"
    )
    options: list[str] = [str(value) for value in get_args(_literal(annotation))]
    close = nearest(value, options) if options and isinstance(value, str) else ""
    return ConfigError(
        f"{key} cannot be {short(value)}",
        where=tree.where(path),
        why=f"expected {expected}{meaning}",
        do=close if close.startswith("did you") else f"correct the value{default}",
    )


def _offer(name: str, names: list[str], root: type[BaseModel], home: Path) -> str:
    """Return the nearest key of this section, or the section where that key does exist."""
    close = nearest(name, names)
    if close.startswith("did you"):
        return close
    full = [key for key, *_ in rows(root) if key.rsplit(".", 1)[-1] == name]
    if full:
        return f'did you mean "{full[0]}"?'
    return close if names else f"remove {dotted((*home, name))}"


def _field(root: type[BaseModel], path: Path) -> tuple[Any, FieldInfo | None]:
    """Return the type at a path, and the nearest described key around it."""
    annotation: Any = root
    info: FieldInfo | None = None
    for key in path:
        section = _section_in(annotation)
        if isinstance(key, str) and section is not None:
            if key not in section.model_fields:
                return annotation, info
            info = section.model_fields[key]
            annotation = info.annotation
            continue
        wanted = list if isinstance(key, int) else dict
        for form in _forms(annotation):
            if get_origin(form) is wanted:
                annotation = get_args(form)[-1]
                break
            if isinstance(key, int) and get_origin(form) is tuple:
                annotation = get_args(form)[0]
                break
    return annotation, info


def _forms(annotation: object) -> Iterator[object]:
    """Yield what a type can be: the members of a union, without their constraints."""
    if _is_annotated(annotation):
        yield from _forms(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _forms(part)
    else:
        yield annotation


def _section_in(annotation: object) -> type[BaseModel] | None:
    for form in _forms(annotation):
        if is_section(form):
            return form
        if get_origin(form) is list:
            inner = _section_in(get_args(form)[0])
            if inner is not None:
                return inner
    return None


def _first_list(annotation: object) -> object:
    return next((form for form in _forms(annotation) if get_origin(form) is list), None)


def _literal(annotation: object) -> object:
    return next((form for form in _forms(annotation) if get_origin(form) is Literal), None)


def _is_annotated(annotation: object) -> bool:
    return get_origin(annotation) is Annotated


def _is_field(item: object) -> TypeGuard[FieldInfo]:
    return isinstance(item, FieldInfo)


def _range(limits: Iterable[Any]) -> str:
    parts: list[str] = []
    for limit in limits:
        if isinstance(limit, at.Gt):
            parts.append(f"above {limit.gt}")
        elif isinstance(limit, at.Ge):
            parts.append(f"of at least {limit.ge}")
        elif isinstance(limit, at.Lt):
            parts.append(f"below {limit.lt}")
        elif isinstance(limit, at.Le):
            parts.append(f"of at most {limit.le}")
    return " " + " and ".join(parts) if parts else ""


def _plural(words: str) -> str:
    for one, many in (("a whole number", "whole numbers"), ("a number", "numbers")):
        if words.startswith(one):
            return words.replace(one, many, 1)
    return words
