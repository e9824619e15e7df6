"""The forms a row may come in, and their one canonical form each."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from selectune.data.examples import Row
from selectune.errors import DataError, nearest

_NEEDED: dict[str, frozenset[str]] = {
    # In this order: data sets often carry a ready-made `text` beside the parts it was made of.
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "alpaca": frozenset({"instruction", "output"}),
    "text": frozenset({"text"}),
}
FORMS = tuple(_NEEDED)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"} | {
    name: name for name in ("system", "tool", "developer")
}
# The template of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), with a line break at the
# end, so that no token spans prompt and completion.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def find_form(row: Mapping[str, Any], origin: str) -> str:
    """Return the form of a row by its columns, those that hold something going first.

    Raises:
        DataError: no form has these columns; the nearest names are offered.
    """
    present = {name for name, value in row.items() if value is not None}
    for columns in (present, set(row)):
        for form, needed in _NEEDED.items():
            if needed <= columns:
                return form
    wanted = "; ".join(f"{form}: {' + '.join(sorted(need))}" for form, need in _NEEDED.items())
    half = next((n for n in _NEEDED.values() if n & present), None)
    if half is not None:
        missing = ", ".join(f'"{name}"' for name in sorted(half - present))
        hint = f"add {missing} to every row"
    else:
        names = frozenset[str]().union(*_NEEDED.values())
        hints = [f'"{c}": {nearest(c, names)}' for c in sorted(present)]
        close = [hint for hint in hints if "did you mean" in hint]
        hint = "; ".join(close) or "rename the columns to those of one form"
    raise DataError(
        f"columns {', '.join(sorted(map(repr, present))) or '(none)'} make no known form",
        where=origin,
        why=f"a row needs the columns of one form: {wanted}",
        do=hint,
    )


def canonical_row(
    raw: Mapping[str, Any], form: str, *, origin: str, stem: str, name: str | None
) -> Row:
    """Read one row.

    Args:
        raw: the row as it came.
        form: one of `FORMS`.
        origin: file and line, for messages.
        stem: source of a row that names none.
        name: source given by the user, which goes before the row's own.

    Raises:
        DataError: a field is missing, empty, or not what its form asks for.
    """
    # Tables have every column in every row, JSON lines only those that are set: null is absence.
    row = {key: value for key, value in raw.items() if value is not None}
    missing = sorted(_NEEDED[form] - row.keys())
    if missing:
        others = [f for f, needed in _NEEDED.items() if needed <= row.keys()]
        raise DataError(
            f"a row of form {form} lacks {', '.join(map(repr, missing))}",
            where=origin,
            why=f"this row looks like form {others[0]}: one file, one form"
            if others
            else f"it has {', '.join(map(repr, sorted(row))) or 'no value at all'}",
            do="put rows of another form into a file of their own"
            if others
            else "fill the field, or remove the row",
        )
    content = _READERS[form](row, origin)
    options, answer = _options(row, content, origin)
    return Row(
        content=content,
        source=name or _label(row, ("source",), origin) or stem,
        group=_label(row, ("group", "subtask"), origin),
        options=options,
        answer=answer,
        origin=origin,
        extra=raw,
    )


def _text(row: Mapping[str, Any], key: str, origin: str, *, may_be_empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        kind = type(cast(object, value))
        is_chat = kind is list and key in ("prompt", "completion")
        raise DataError(
            f'"{key}" must be text, found {kind.__name__}: {str(cast(object, value))[:60]}',
            where=origin,
            do='join both lists into one "messages" column' if is_chat else "write it as a string",
        )
    return _checked(value, key, origin, may_be_empty=may_be_empty)


def _checked(value: str, key: str, origin: str, *, may_be_empty: bool = False) -> str:
    if not may_be_empty and not value.strip():
        raise DataError(
            f'"{key}" is empty',
            where=origin,
            why="there is nothing in it to learn from",
            do="fill it, or remove the row",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'"{key}" holds half a character: {value[error.start]!r} at position {error.start}',
            where=origin,
            why="a lone surrogate is no Unicode text; it comes from text cut in the middle of an "
            "escape",
            do="repair or remove the row",
        ) from error
    return value


def _label(row: Mapping[str, Any], keys: tuple[str, ...], origin: str) -> str:
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int):
            return _checked(str(value), key, origin, may_be_empty=True)
    return ""


def _read_text(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    return {"text": _text(row, "text", origin)}


def _read_prompt_completion(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    return {
        "prompt": _text(row, "prompt", origin, may_be_empty=True),
        "completion": _text(row, "completion", origin),
    }


def _read_alpaca(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    instruction = _text(row, "instruction", origin)
    context = _text(row, "input", origin, may_be_empty=True) if "input" in row else ""
    template = _ALPACA_INPUT if context.strip() else _ALPACA
    return {
        "prompt": template.format(instruction=instruction, input=context),
        "completion": _text(row, "output", origin),
    }


def _read_messages(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    return _conversation(row, "messages", "role", "content", origin)


def _read_sharegpt(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    return _conversation(row, "conversations", "from", "value", origin)


def _conversation(
    row: Mapping[str, Any], column: str, role_key: str, text_key: str, origin: str
) -> dict[str, Any]:
    turns = cast(list[object], row[column])
    if type(turns) is not list or not turns:
        raise DataError(
            f'"{column}" must be a list of turns, found {str(turns)[:60]!r}',
            where=origin,
            do=f'write [{{"{role_key}": "user", "{text_key}": "..."}}, ...]',
        )
    messages: list[dict[str, str]] = []
    for k, turn in enumerate(turns):
        where = f"{origin}, turn {k}"
        fields: Mapping[str, Any] = (
            cast(Mapping[str, Any], turn) if isinstance(turn, Mapping) else {}
        )
        if not {role_key, text_key} <= fields.keys():
            raise DataError(
                f'a turn needs "{role_key}" and "{text_key}", found {str(cast(object, turn))[:60]}',
                where=where,
                do="write both for every turn",
            )
        if fields.get("tool_calls"):
            raise DataError(
                "a turn calls tools, which is not supported",
                where=where,
                do="write the call into the turn's text, or remove the row",
            )
        role = fields[role_key]
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"unknown role {role!r}", where=where, do=nearest(str(role), _ROLES))
        is_reply = _ROLES[role] == "assistant"
        text = _text(fields, text_key, where, may_be_empty=not is_reply)
        messages.append({"role": _ROLES[role], "content": text})
    if all(turn["role"] != "assistant" for turn in messages):
        raise DataError(
            "a conversation without an assistant turn",
            where=origin,
            why="the assistant's words are what is learnt",
            do="add one, or remove the row",
        )
    return {"messages": messages}


def _options(
    row: Mapping[str, Any], content: Mapping[str, Any], origin: str
) -> tuple[tuple[str, ...], int]:
    """Return the answer options and the index of the right one, from the row's own columns."""
    given = row.get("options")
    if "completion" not in content or not isinstance(given, list) or not given:
        return (), -1
    texts = cast(list[Any], given)
    if not all(isinstance(text, str) and text for text in texts):
        raise DataError('every one of "options" must be text', where=origin)
    options = tuple(_checked(text, "options", origin) for text in cast(list[str], texts))
    if len(set(options)) < len(options):
        raise DataError('two of "options" are the same', where=origin, do="remove one of them")
    if content["completion"] not in options:
        raise DataError(
            f'the completion {content["completion"]!r} is none of "options"',
            where=origin,
            why="the right option is the completion, character by character, spaces included",
            do="write the completion as it stands in the options",
        )
    answer = options.index(content["completion"])
    said = row.get("answer", answer)
    if isinstance(said, str) and said.isdecimal():
        said = int(said)
    if isinstance(said, int) and said != answer:
        raise DataError(
            f'"answer" is {said}, but the completion is option {answer}',
            where=origin,
            why="options are counted from 0",
            do="correct one of the two, or leave out the answer",
        )
    return options, answer


_READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "prompt-completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "text": _read_text,
}
