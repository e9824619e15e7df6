"""What an example is: canonical content, an id made from it, and sets of examples."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data in canonical form.

    Attributes:
        id: first 16 hex digits of the sha256 of the canonical content, "-", occurrence number:
            equal rows get different ids, and every join is by id.
        content: one of `{"text"}`, `{"prompt", "completion"}` or `{"messages"}`.
        source: the name given to the file, else the row's `source`, else the file's stem.
        group: the row's `group` or `subtask`, else "".
        options: answer options for cloze evaluation; () if there are none.
        answer: index of the right option, -1 if there is none.
        origin: file and line, such as "pool.jsonl:12", for messages.
        extra: the untouched row, so that a selection can be written in the user's own columns.
    """

    id: str
    content: Mapping[str, Any]
    source: str
    group: str
    options: tuple[str, ...]
    answer: int
    origin: str
    extra: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row in canonical form that waits for its id, which depends on the rows beside it."""

    content: Mapping[str, Any]
    source: str
    group: str
    options: tuple[str, ...]
    answer: int
    origin: str
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class ExampleSet(Sequence[Example]):
    """Examples in the order of their files.

    Attributes:
        items: the examples.
        form: the form found, such as "prompt-completion"; several, joined by ", ", when the files
            that make up the set differ.
    """

    items: tuple[Example, ...]
    form: str
    _fingerprint: list[str] = field(default_factory=list[str], repr=False, compare=False)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "ExampleSet": ...
    def __getitem__(self, index: int | slice) -> "Example | ExampleSet":
        """Return one example, or a set of some of them with the ids they have here."""
        if isinstance(index, slice):
            return ExampleSet(self.items[index], self.form)
        return self.items[index]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.items)

    @property
    def n_rows(self) -> int:
        """Number of examples, equal ones counted each."""
        return len(self.items)

    @property
    def n_duplicates(self) -> int:
        """Number of examples whose content another example before them has already."""
        return len(self.items) - len({content_key(example.id) for example in self.items})

    @property
    def fingerprint(self) -> str:
        """The sha256 over the sorted ids: the same for the same rows in any order or format."""
        if not self._fingerprint:
            ids = sorted(example.id for example in self.items)
            self._fingerprint.append(hashlib.sha256("\n".join(ids).encode()).hexdigest())
        return self._fingerprint[0]


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of the sha256 of the canonical JSON of `content`."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def content_key(example_id: str) -> str:
    """Return the part of an id that equal rows share."""
    return example_id.rpartition("-")[0]


def number_rows(rows: Iterable[Row]) -> tuple[Example, ...]:
    """Give each row its id: content hash and how many equal rows came before it."""
    seen: Counter[str] = Counter()
    examples: list[Example] = []
    for row in rows:
        key = content_hash(row.content)
        examples.append(
            Example(
                id=f"{key}-{seen[key]}",
                content=row.content,
                source=row.source,
                group=row.group,
                options=row.options,
                answer=row.answer,
                origin=row.origin,
                extra=row.extra,
            )
        )
        seen[key] += 1
    return tuple(examples)


def plain_text(content: Mapping[str, Any]) -> str:
    """Return the words of an example as one text, for reports and for comparing examples."""
    if "text" in content:
        return content["text"]
    if "messages" in content:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in content["messages"])
    return content["prompt"] + content["completion"]
