"""GIST: the examples whose gradients point where the target's do, inside the target's own space.

    K = V^T V = U diag(s^2) U^T      r: smallest rank with 95 % of the energy
    x = diag(1/s_r) U_r^T a          c_j = s_r * U[j, :r]          S = max_j cos(x, c_j)

Paper  "GIST: Targeted Data Selection for Instruction Tuning via Coupled Optimization Geometry",
  arXiv 2602.18584 (ICML 2026), section 4. Its release (GuanghuiMin/GIST) fixes the rank and takes
  the best subtask mean. Ours: the numerical floor, ties by id, `energy`, ranks "loo", "gap" and
  "split", "per_subtask", refusing rank 1.
Cost   Time: one warm-up epoch on 5 % of the pool, one gradient pass over the pool; after that any
  rank or aggregate in seconds. Memory: one module's rows and one module's target gradients; the
  target gradients of the whole model lie on disk, so memory does not grow as targets x parameters.
Fails  An example with almost nothing in the target space scores like one that lives in it: look at
  the energy, or multiply it in. With a few noisy targets the space is noise; run `random` beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from selectune.errors import SelectionError
from selectune.gradients.facts import GradientFacts, near_targets
from selectune.gradients.subspace import Spectrum, rank_of, spectrum
from selectune.methods.evidence import Evidence
from selectune.recipe.sections import RANK_RULE
from selectune.registry import data_scorer
from selectune.selection import Scores

Aggregate = Literal["max_example", "max_subtask_mean", "mean_example", "per_subtask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GistOptions:
    """How GIST reads the target space; the defaults are the paper's."""

    aggregate: Annotated[
        Aggregate,
        Field(description="best target (paper), best subtask mean (release), mean of targets"),
    ] = "max_example"
    rank: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=RANK_RULE)],
        Field(
            description='"energy:0.95" (paper), a number (release: 150), "full", or (ours) "loo": '
            'best for a target left out; "split:0.95": that share of what one half of the targets '
            'can hold of the other, over 20 random halves; "gap": before the largest ratio of '
            "neighbouring eigenvalues, up to half of the directions; all three from 2 on"
        ),
    ] = "energy:0.95"
    energy: Annotated[
        str,
        Field(
            pattern=r"^(report|multiply|gate:(0?\.\d+|0|1))$",
            description='captured energy: "report" (paper), "multiply" or "gate:0.1" (ours)',
        ),
    ] = "report"
    normalize_targets: Annotated[
        bool, Field(description="unit target gradients before the Gram matrix (ours)")
    ] = False


def chosen_rank(
    options: GistOptions,
    directions: Spectrum,
    gram: Float[np.ndarray, "m m"],
    ids: Sequence[str],
    *,
    seed: int = 0,
) -> int:
    """Return the rank that the options ask for, at most the number of sound directions.

    Args:
        options: of GIST.
        directions: of the targets.
        gram: inner products of the targets.
        ids: of the targets, for rank "split".
        seed: of its halves.

    Raises:
        SelectionError: rank 1, where every score would be +1 or -1.
    """
    rank = rank_of(options.rank, directions, gram, ids, seed=seed)
    if rank < 1 or (rank == 1 and options.energy != "multiply"):
        raise SelectionError(
            f"GIST has rank {rank}: every score would be exactly 1 or -1",
            where=f"{len(gram)} targets, rank {options.rank}",
            why="in one dimension a cosine is a sign",
            do="give more targets, a larger rank, score.options.energy=multiply, "
            "or score.method=grad_cosine",
        )
    return rank


def cosines(x: Float[np.ndarray, "n r"], c: Float[np.ndarray, "m r"]) -> Float[np.ndarray, "n m"]:
    """Return the cosine of every row of x and every row of c; 0 where a vector is 0."""
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(c, axis=1)
    return np.divide(x @ c.T, scale, out=np.zeros((len(x), len(c))), where=scale > 0)


def _subtask_means(
    facts: GradientFacts, c: Float[np.ndarray, "m r"]
) -> tuple[list[str], Float[np.ndarray, "t r"]]:
    names = sorted(set(facts.groups))
    labels = np.asarray(facts.groups)
    return names, np.stack([c[labels == name].mean(0) for name in names])


@data_scorer("gist", options=GistOptions, needs={"gradients"})
def score(evidence: Evidence, options: GistOptions) -> Scores:
    """Rank the pool by cosine to the targets inside the targets' leading directions."""
    facts = evidence.gradients
    assert facts is not None
    gram, dots = facts.gram.astype(np.float64), facts.dots.astype(np.float64)
    if options.normalize_targets:
        unit = 1 / np.sqrt(np.clip(np.diag(gram), np.finfo(float).tiny, None))
        gram, dots = gram * unit * unit[:, None], dots * unit
    directions = spectrum(gram)
    rank = chosen_rank(options, directions, gram, facts.target_ids, seed=evidence.seed)
    x, c = directions.coordinates(dots, rank), directions.target_coordinates(rank)
    by_target = cosines(x, c)
    columns: dict[str, Any] = {}
    match options.aggregate:
        case "max_example":
            main = by_target.max(1)
        case "mean_example":
            main = by_target.mean(1)
        case "max_subtask_mean" | "per_subtask":
            names, means = _subtask_means(facts, c)
            by_subtask = cosines(x, means)
            main = by_subtask.max(1)
            if options.aggregate == "per_subtask":
                columns = {f"subtask:{n}": by_subtask[:, k] for k, n in enumerate(names)}
    norms = facts.norms.astype(np.float64)
    captured = np.linalg.norm(x, axis=1)
    # fp32 dot products and norms can disagree by a rounding: a share is at most 1.
    energy = np.divide(captured, norms, out=np.zeros_like(norms), where=norms > 0).clip(0, 1)
    if options.energy == "multiply":
        main = main * energy
    elif options.energy.startswith("gate:"):
        main = np.where(energy >= float(options.energy[5:]), main, -1.0)
    columns |= {"energy": energy, "norm": norms}
    columns |= {f"to:{j}": by_target[:, k] for k, j in enumerate(facts.target_ids)}
    best = tuple(facts.target_ids[k] for k in by_target.argmax(1))
    about = {
        "rank": rank,
        "eigenvalues": (directions.s**2).tolist(),
        "energy_held": float(directions.energy[rank - 1]),
        "n_targets": len(gram),
        "target_norms": np.sqrt(np.clip(np.diag(facts.gram), 0, None)).tolist(),
        "near_targets": near_targets(facts.cosines, evidence.ids, facts.target_ids),
    }
    return Scores("gist", evidence.ids, main, columns, best, about)
