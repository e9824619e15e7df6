"""What the page of an emulator tells: plain values out of the record of its owner."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

Fate = Literal["adapter", "smaller", "whole", "shared", "gone"]

CHANNELS = "MLP"
_ROLES = (("q_proj",), ("k_proj",), ("v_proj",), ("c_attn",), ("o_proj", "out_proj", "c_proj"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """The components of one matrix, or the channels of one MLP: which of them stayed.

    Args:
        name: of the module inside its layer; "MLP" for channels.
        is_kept: of each component, in the order of singular values, or of each channel.
        scores: the highest were kept.
        spectrum: singular values, falling; None for channels.
        size: share of all numbers that one component or channel takes.
        n_protected: so many of the first stayed whatever their score.
        is_whole: nothing was taken away, and nothing was factored.
    """

    name: str
    is_kept: Bool[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    spectrum: Float[np.ndarray, " n"] | None
    size: float
    n_protected: int
    is_whole: bool

    @property
    def n(self) -> int:
        """How many there were."""
        return len(self.is_kept)

    @property
    def n_kept(self) -> int:
        """How many stayed."""
        return int(self.is_kept.sum())

    @property
    def share(self) -> float:
        """Share of the numbers that stayed."""
        return 1.0 if self.is_whole else self.n_kept * self.size

    @property
    def words(self) -> str:
        """What stayed, for a person."""
        return "whole" if self.is_whole else f"{self.n_kept:,} of {self.n:,}"

    @classmethod
    def of_matrix(cls, name: str, found: Mapping[str, Any]) -> "Cut":
        """Return what plain values say of a matrix."""
        m, n = found["shape"]
        spectrum = np.asarray(found["spectrum"], np.float64)
        return cls(
            name=name, spectrum=spectrum, size=(m + n) / (m * n), n_protected=found["protected"],
            **_kept(found),
        )  # fmt: skip

    @classmethod
    def of_channels(cls, found: Mapping[str, Any]) -> "Cut":
        """Return what plain values say of an MLP."""
        size = 1 / len(found["scores"])
        return cls(name=CHANNELS, spectrum=None, size=size, n_protected=0, **_kept(found))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmulatorFacts:
    """An emulator, as its owner sees it.

    Args:
        n_layers: of the model.
        adapters: layers that go out whole, to be tuned.
        sources: for each layer that the emulator has, the one whose weights it runs.
        cuts: by layer, what was made smaller; a layer that is not named was not.
        about: method, options, shares, text, cost and seed.
        quality: what was measured.
        package: id of the package.
        package_bytes: size of its files; None where it is not there any more.
    """

    n_layers: int
    adapters: tuple[int, ...]
    sources: Mapping[int, int]
    cuts: Mapping[int, Sequence[Cut]]
    about: Mapping[str, Any]
    quality: Mapping[str, Any]
    package: str
    package_bytes: int | None

    @classmethod
    def of(cls, record: Mapping[str, Any], package_bytes: int | None = None) -> "EmulatorFacts":
        """Return what an owner's record says.

        Args:
            record: `owner.json`.
            package_bytes: size of the package's files.
        """
        about: Mapping[str, Any] = record["about"]
        # One record of a whole stack names the layers in it; it has nothing that was cut.
        layers = [layer for layer in about["layers"] if "matrices" in layer]
        return cls(
            n_layers=record["n_layers"],
            adapters=tuple(about["adapters"]),
            sources=dict(zip(record["positions"], record["sources"], strict=True)),
            cuts={layer["original"]: _cuts(layer) for layer in layers},
            about=about,
            quality=about["quality"],
            package=record["package"],
            package_bytes=package_bytes,
        )

    @property
    def middle(self) -> tuple[int, ...]:
        """The layers that the emulator stands in for."""
        return tuple(j for j in range(self.n_layers) if j not in self.adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """What the layers that were cut consist of; empty where whole layers were chosen."""
        found = dict.fromkeys(cut.name for cuts in self.cuts.values() for cut in cuts)
        return tuple(found)

    def fate(self, j: int) -> Fate:
        """Return what became of a layer."""
        if j in self.adapters:
            return "adapter"
        if j not in self.sources:
            return "gone"
        if self.sources[j] != j:
            return "shared"
        cuts = self.cuts.get(j, ())
        return "whole" if all(cut.is_whole for cut in cuts) else "smaller"

    def words(self, j: int) -> str:
        """Return what became of a layer as a whole, for a person."""
        return {
            "adapter": "whole, to be tuned",
            "smaller": "made smaller",
            "whole": "whole",
            "shared": f"runs the weights of {self.sources.get(j)}",
            "gone": "left out",
        }[self.fate(j)]


def _kept(found: Mapping[str, Any]) -> dict[str, Any]:
    scores = np.asarray(found["scores"], np.float64)
    kept = found["kept"]
    is_kept = np.full(len(scores), kept is None)
    is_kept[kept or []] = True
    return {"scores": scores, "is_kept": is_kept, "is_whole": kept is None}


def _cuts(layer: Mapping[str, Any]) -> list[Cut]:
    """Return the cuts of one layer: q, k, v, o, and the channels."""
    found = [
        Cut.of_matrix(key, layer["matrices"][key]) for key in sorted(layer["matrices"], key=_place)
    ]
    if layer["channels"] is not None:
        found.append(Cut.of_channels(layer["channels"]))
    return found


def _place(key: str) -> tuple[int, int, str]:
    """Return where a matrix stands in a layer; the parts of a fused one by their first row."""
    name, _, part = key.partition("[")
    role = name.rpartition(".")[2]
    places = [k for k, names in enumerate(_ROLES) if role in names]
    first = re.match(r"\d+", part)
    return places[0] if places else len(_ROLES), int(first[0]) if first else 0, key
