"""Reading examples: local files, folders of datasets, the Hub, objects in memory."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict

from selectune.data.examples import ExampleSet, Row, number_rows
from selectune.data.forms import FORMS, canonical_row, find_form
from selectune.data.sources import FILE_READERS, Raw, read_folder, read_hub
from selectune.errors import ConfigError, DataError, nearest

Spec = str | Path | Dataset | Sequence[Any] | Mapping[str, Any]


def read_examples(spec: Spec, *, what: str = "pool", form: str = "auto") -> ExampleSet:
    """Read examples, find their form, and give each its id.

    Args:
        spec: a .jsonl, .json, .parquet or .csv file; a folder saved by datasets; a Hub data set
            ("owner/name" or "hub:name[@config][:split]", split "train" unless named); a Dataset; a
            list of rows; a list of any of these; or a mapping of names to these, where the name
            becomes the `source` of the examples.
        what: what the examples are for, for messages.
        form: "auto", "text", "prompt-completion", "messages", "alpaca" or "sharegpt".

    Raises:
        ConfigError: `form` is not one of these, or a Dataset has no single split.
        DataError: nothing is found, a file is malformed, or a row cannot be used; with the line.
    """
    if form != "auto" and form not in FORMS:
        raise ConfigError(
            f'unknown form "{form}"', where="data.format", do=nearest(form, ["auto", *FORMS])
        )
    found: Counter[str] = Counter()
    examples = number_rows(_rows(spec, None, what, form, found))
    if not examples:
        raise DataError(
            f"the {what} has no rows",
            where=_name(spec),
            why="every step needs at least one example",
            do=f"name a {what} with rows in it",
        )
    return ExampleSet(examples, ", ".join(found))


def _name(spec: Spec) -> str:
    return str(spec) if isinstance(spec, str | Path) else f"data in memory ({type(spec).__name__})"


def _rows(spec: Spec, name: str | None, what: str, form: str, found: Counter[str]) -> Iterator[Row]:
    if isinstance(spec, str | Path):
        stem, raws = _open(spec, what)
        yield from _canonical(raws, stem, name, form, found)
    elif isinstance(spec, DatasetDict):
        splits = ", ".join(map(str, spec))
        raise ConfigError(
            "a DatasetDict is several data sets",
            where=what,
            do=f'pass one split, such as dataset["{next(iter(spec), "train")}"] (it has {splits})',
        )
    elif isinstance(spec, Dataset):
        rows = cast(Iterator[object], iter(spec))
        raws = ((f"{what}[{k}]", row) for k, row in enumerate(rows))
        yield from _canonical(raws, what, name, form, found)
    elif isinstance(spec, Mapping):
        for key, part in spec.items():
            yield from _rows(part, key, what, form, found)
    elif spec and isinstance(spec[0], Mapping) and not _is_nested(cast(Mapping[str, Any], spec[0])):
        raws = ((f"{what}[{k}]", row) for k, row in enumerate(spec))
        yield from _canonical(raws, what, name, form, found)
    else:
        for part in spec:
            yield from _rows(part, name, what, form, found)


def _is_nested(entry: Mapping[str, Any]) -> bool:
    """Say whether an entry of a list is a mapping of names to files, and not a row."""
    return all(isinstance(v, Path | Dataset) for v in entry.values()) and bool(entry)


def _open(spec: str | Path, what: str) -> tuple[str, Iterator[Raw]]:
    """Return the stem and the raw rows of what a path or a name names."""
    text = str(spec)
    if text.startswith("hub:"):
        return read_hub(text.removeprefix("hub:"), what)
    path = Path(text).expanduser()
    if path.is_dir():
        return path.name, read_folder(path)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in FILE_READERS:
            raise DataError(
                f'cannot tell the format of "{path.name}"',
                where=str(path),
                why=f"the name must end in one of {', '.join(FILE_READERS)}",
                do="rename or convert the file",
            )
        return path.stem, FILE_READERS[suffix](path)
    looks_local = isinstance(spec, Path) or suffix in FILE_READERS or text[:1] in "/.~"
    if looks_local or text.count("/") > 1 or not text:
        folder = path.parent
        near = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        hint = nearest(path.name, near) if near else f"the folder {folder} is empty or missing"
        raise DataError(
            f'the {what} "{text}" does not exist',
            where=str(path.absolute()),
            do=hint if len(hint) < 200 else "check the path",
        )
    return read_hub(text, what)


def _canonical(
    raws: Iterator[Raw], stem: str, name: str | None, form: str, found: Counter[str]
) -> Iterator[Row]:
    here = "" if form == "auto" else form
    for origin, entry in raws:
        if not isinstance(entry, Mapping):
            raise DataError(
                f"a row must be an object with named fields, found {str(entry)[:60]!r}",
                where=origin,
                do='write rows such as {"prompt": "...", "completion": "..."}',
            )
        raw = cast(Mapping[str, Any], entry)
        # Found once per file: a row of another form in the same file is more likely an accident.
        here = here or find_form(raw, origin)
        row = canonical_row(raw, here, origin=origin, stem=stem, name=name)
        found[here] += 1
        yield row
