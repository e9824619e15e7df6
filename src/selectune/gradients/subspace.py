"""The space that a few target gradients span, read off their Gram matrix alone.

With V = [v_1 .. v_M] the target gradients and K = V^T V = U diag(s^2) U^T, the basis is
P = V U_r diag(1/s_r); it is never formed. A pool example's coordinates are x = diag(1/s_r) U_r^T a
from its dot products a_j = <g, v_j>, a target's are c_j = s_r * U[j, :r]. Float64 throughout.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selectune.errors import SelectionError

# Directions below this share of the largest singular value are rounding of fp32 dot products.
_FLOOR = 1e-4
_N_SPLITS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Directions of a set of target gradients, strongest first.

    Args:
        U: eigenvectors of the Gram matrix, one column per direction above the numerical floor.
        s: singular values of V, descending, all above the floor.
    """

    U: Float[np.ndarray, "m k"]
    s: Float[np.ndarray, " k"]

    @property
    def energy(self) -> Float[np.ndarray, " k"]:
        """Share of the summed squared target norms that the first 1, 2, .. directions hold."""
        return np.cumsum(self.s**2) / np.sum(self.s**2)

    def coordinates(self, dots: Float[np.ndarray, "n m"], rank: int) -> Float[np.ndarray, "n r"]:
        """Return x = P^T g of examples with dot products `dots` to the targets."""
        return (dots.astype(np.float64) @ self.U[:, :rank]) / self.s[:rank]

    def target_coordinates(self, rank: int) -> Float[np.ndarray, "m r"]:
        """Return c_j = P^T v_j of every target."""
        return self.U[:, :rank] * self.s[:rank]


def spectrum(gram: Float[np.ndarray, "m m"]) -> Spectrum:
    """Return the directions of the targets whose Gram matrix is given.

    Raises:
        SelectionError: the target gradients are zero or not finite.
    """
    K = np.asarray(gram, np.float64)
    if not np.isfinite(K).all():
        raise SelectionError(
            "a target gradient is not finite",
            why="the loss of a target example overflowed",
            do="use model.dtype=float32, or take the example out",
        )
    values, vectors = np.linalg.eigh((K + K.T) / 2)
    s = np.sqrt(np.clip(values[::-1], 0, None))
    U = vectors[:, ::-1]
    keep = s > _FLOOR * s[0] if s[0] > 0 else np.zeros(len(s), bool)
    if not keep.any():
        raise SelectionError(
            "all target gradients are zero",
            why="the model already gives every target answer with certainty, or nothing trains",
            do="use other targets, or check `selectune plan` for what is trainable",
        )
    return Spectrum(U[:, keep], s[keep])


def rank_by_energy(directions: Spectrum, share: float) -> int:
    """Return the smallest rank that holds `share` of the energy (GIST, 95 % rule)."""
    # The last entry is 1 up to rounding; the clip keeps share=1 inside the range.
    return min(int(np.searchsorted(directions.energy, share - 1e-12)) + 1, len(directions.s))


def rank_of(
    rule: int | str,
    directions: Spectrum,
    gram: Float[np.ndarray, "m m"],
    ids: Sequence[str],
    *,
    seed: int = 0,
) -> int:
    """Return the rank that a rule gives, at most the number of sound directions.

    Args:
        rule: a number, or a word that `recipe_sections.RANK_RULE` takes, such as "energy:0.95".
        directions: of the targets.
        gram: inner products of the targets.
        ids: of the targets, for rank "split".
        seed: of its halves.
    """
    full = len(directions.s)
    match rule:
        case int(number):
            return min(number, full)
        case "full":
            return full
        case "loo":
            return min(rank_left_out(gram), full) if len(gram) > 2 else full
        case "gap":
            return rank_by_gap(directions)
        case str(word):
            name, share = word.split(":")
            if name == "energy":
                return rank_by_energy(directions, float(share))
            if len(gram) < 4:
                return full
            return min(rank_by_split(gram, ids, float(share), seed=seed), full)


def rank_left_out(gram: Float[np.ndarray, "m m"]) -> int:
    """Return the smallest rank within one standard error of the best at foretelling new targets.

    At least 2: at rank 1 every score is +1 or -1.

    Each target in turn is left out; what counts is the share of its energy inside the first r
    directions of the others, which can only grow with r: hence the standard error.
    """
    K = np.asarray(gram, np.float64)
    m = len(K)
    held = np.zeros((m, m - 1))
    for j in range(m):
        others = np.delete(np.arange(m), j)
        directions = spectrum(K[np.ix_(others, others)])
        x = directions.coordinates(K[j, others][None], len(directions.s))[0]
        share = np.cumsum(x**2) / max(K[j, j], np.finfo(float).tiny)
        held[j, : len(share)] = share
        held[j, len(share) :] = share[-1]
    mean = held.mean(0)
    error = held.std(0, ddof=1) / np.sqrt(m) if m > 1 else np.zeros(m - 1)
    best = int(mean.argmax())
    return max(int(np.argmax(mean >= mean[best] - error[best])) + 1, 2)


def rank_by_gap(directions: Spectrum) -> int:
    """Return the rank before the largest relative gap between neighbouring eigenvalues.

    That is the r with the largest s_r / s_(r+1), the smallest such r where there are several. Only
    ranks from 2 to half of the sound directions are looked at: at rank 1 every score is +1 or -1,
    and the ratios of the last eigenvalues, which are all noise, are large by chance. With fewer
    than 4 directions all of them are kept.

    Source:
        The eigenvalue ratio of Lam and Yao, "Factor modeling for high-dimensional time series",
        Annals of Statistics 40 (2012), section 2.2, and its bound of half the dimensions.
    """
    most = len(directions.s) // 2
    if most < 2:
        return len(directions.s)
    return int(np.argmax(directions.s[1:most] / directions.s[2 : most + 1])) + 2


def rank_by_split(
    gram: Float[np.ndarray, "m m"], ids: Sequence[str], share: float, *, seed: int = 0
) -> int:
    """Return the smallest rank with `share` of the energy that one half holds of the other.

    The targets are halved at random, 20 times. The directions of each half are asked how much of
    the other half's energy their first 1, 2, .. hold; what counts is the mean over all halves, as
    a share of what all directions hold. Noise of single targets is in no other target, so the
    directions that are noise add next to nothing. The result is at most half of the targets, and
    at least 2: at rank 1 every score is +1 or -1.

    Args:
        gram: inner products of the targets, 4 or more.
        ids: of the targets; the halves depend on them and not on their order.
        share: of the energy held.
        seed: of the halves.
    """
    K = np.asarray(gram, np.float64)
    half = len(K) // 2
    held = np.zeros(len(K) - half)
    for k in range(_N_SPLITS):
        order = np.asarray(sorted(range(len(K)), key=lambda j: _drawn(seed, k, ids[j])))
        for mine, others in ((order[:half], order[half:]), (order[half:], order[:half])):
            directions = spectrum(K[np.ix_(mine, mine)])
            x = directions.coordinates(K[np.ix_(others, mine)], len(directions.s))
            found = np.cumsum((x**2).sum(0)) / np.trace(K[np.ix_(others, others)])
            held += np.pad(found, (0, len(held) - len(found)), mode="edge")
    return max(int(np.searchsorted(held / held[-1], share - 1e-12)) + 1, 2)


def _drawn(seed: int, k: int, target: str) -> bytes:
    return hashlib.sha256(f"halves:{seed}:{k}:{target}".encode()).digest()


def overlap(
    one: Spectrum, other: Spectrum, cross: Float[np.ndarray, "m n"], ranks: tuple[int, int]
) -> float:
    """Return how much of two spaces is common: 1 where they are equal, 0 where orthogonal.

    That is ||P_1^T P_2||_F^2 / max(r_1, r_2), with P_1^T P_2 = diag(1/s_1) U_1^T C U_2 diag(1/s_2).

    Args:
        one: directions of the first target gradients.
        other: directions of the second.
        cross: C, inner products of the first with the second.
        ranks: how many directions of each make up its space.
    """
    r_1, r_2 = ranks
    x = one.coordinates(cross.T, r_1)  # P_1^T of the second gradients, one row each
    common = (other.U[:, :r_2].T @ x) / other.s[:r_2, None]
    return float(np.sum(common**2) / max(ranks))
