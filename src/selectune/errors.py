"""One small tree of errors; every message says what, where, why and what to do."""

import difflib
from collections.abc import Iterable

TOLD = "`selectune methods` tells what each of them does"


class SelectuneError(Exception):
    """A failure that a user can act on.

    Args:
        what: the fact, in one line, naming the offending value.
        where: file, line, key or example that it came from.
        why: the rule or the state that makes it wrong.
        do: the next thing to type or to change.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        labelled = (("where", where), ("why", why), ("do", do))
        lines = [what, *(f"  {label + ':':<7}{text}" for label, text in labelled if text)]
        super().__init__("\n".join(lines))


class ConfigError(SelectuneError):
    """A recipe, an option or a command line is wrong; nothing was loaded."""

    exit_code = 2


class DataError(SelectuneError):
    """A data file or an example cannot be used."""


class SelectionError(SelectuneError):
    """A selection names what does not exist, or cannot be made."""


class CoverageError(SelectuneError):
    """A trainable parameter would get no gradient per example."""


class TrainingError(SelectuneError):
    """Training went wrong: a loss that is not a number, weights that did not move."""


class CorruptFileError(SelectuneError):
    """A file of ours is not what its manifest says."""


class StorageError(SelectuneError):
    """A file or a folder cannot be written: full disk, read-only place, missing rights."""


class IncompatibleRunError(SelectuneError):
    """Results on disk were made for another config, pool, base or version."""


def nearest(name: str, names: Iterable[str], *, instead: str | None = None) -> str:
    """Return a sentence that offers the closest of `names`.

    Args:
        name: what was written.
        names: what could have been meant.
        instead: said when none is close; None lists them.
    """
    known = sorted(names)
    by_case = {each.casefold(): each for each in reversed(known)}
    close = difflib.get_close_matches(name.casefold(), by_case, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{by_case[close[0]]}"?'
    return f"the valid names are: {', '.join(known)}" if instead is None else instead
