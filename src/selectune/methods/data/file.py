"""File: the examples that somebody else's scores put first.

    S = the number that the file gives an id     (its negative with `higher_is_better: false`)

Paper  None: the numbers are yours, or another tool's. They are joined by id, never by position.
Cost   Reading one file.
Fails  Where the scores were made on other texts than this pool's: an id is a hash of the content,
  so a changed row is a missing one, and said.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from selectune.errors import SelectionError
from selectune.methods.evidence import Evidence
from selectune.registry import data_scorer
from selectune.selection import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """Which file, and how it is read."""

    path: Annotated[str, Field(min_length=1, description="a .parquet or .jsonl file: id, score")]
    column: Annotated[str, Field(description="what ranks; other columns of numbers are kept")] = (
        "score"
    )
    higher_is_better: Annotated[bool, Field(description="false: the lowest come first")] = True
    extra: Annotated[
        Literal["refuse", "ignore"],
        Field(description="ids of rows that the pool does not hold, or that were dropped from it"),
    ] = "refuse"


@data_scorer("file", options=FileOptions, needs={"file"})
def score(evidence: Evidence, options: FileOptions) -> Scores:
    """Rank the pool by the scores of a file.

    Raises:
        ConfigError: the file is none of scores, or lacks the column.
        DataError: the file cannot be read.
        SelectionError: it has no score for an example of the pool, or scores for others.
    """
    # Read late: the registry imports every method, and most runs read no scores.
    from selectune.data import content_key
    from selectune.interchange.scores import read_scores

    path = Path(options.path).expanduser()
    found = read_scores(path, column=options.column, higher_is_better=options.higher_is_better)
    place = {example_id: k for k, example_id in enumerate(found.ids)}
    missing = [i for i in evidence.ids if i not in place]
    if missing:
        raise SelectionError(
            f"{path.name} has no score for {len(missing)} of {len(evidence.ids)} examples",
            where=f"{options.path}: {', '.join(missing[:3])}",
            why="an example without a score can be neither chosen nor left out",
            do="score the whole pool as it is now; ids are hashes of the rows' content",
        )
    others = sorted(place.keys() - set(evidence.ids))
    # Equal rows were dropped from the pool, not forgotten in it.
    known = {content_key(i) for i in evidence.ids}
    extra = [i for i in others if content_key(i) not in known]
    if extra and options.extra == "refuse":
        raise SelectionError(
            f"{path.name} has scores for {len(extra)} ids that are no candidates",
            where=f"{options.path}: {', '.join(extra[:3])}",
            why="the pool does not hold them, or they were dropped as leaks or empty",
            do="if that is meant: score.options.extra=ignore",
        )
    rows = np.asarray([place[i] for i in evidence.ids])
    best = tuple(found.best_target[k] for k in rows) if found.best_target else ()
    columns = {name: column[rows] for name, column in found.columns.items()}
    about = {"scored_by": found.method, "n_left_out": len(others)}
    # Named as what the recipe asked for; who made the numbers stands in the facts.
    return replace(
        found,
        method="file",
        ids=evidence.ids,
        score=found.score[rows],
        columns=columns,
        best_target=best,
        about=about,
    )
