"""The owner's page of an emulator, written from what is on record."""

import math
from pathlib import Path

from selectune.errors import ConfigError, IncompatibleRunError
from selectune.files import is_complete, open_dir
from selectune.offsite import manifests
from selectune.offsite.manifests import OwnerRecord
from selectune.offsite.package import OWNER_KIND
from selectune.offsite.table import OffsiteTable
from selectune.report.emulator import write_emulator_report
from selectune.report.emulator_facts import EmulatorFacts
from selectune.report.emulator_frontier import write_frontier

_SAME = 1e-3  # relative: the loss of one model on one probe, on whatever machine


def write_page(owner: Path, package: Path) -> Path:
    """Write the page into the owner's folder, and return its path.

    Args:
        owner: the folder that stays.
        package: the folder to hand out; only its size is told, if it is there.

    Raises:
        CorruptFileError: the record is damaged.
        StorageError: the page cannot be written.
    """
    return write_emulator_report(owner, _facts(owner, package))


def write_pages(
    folder: Path, owner: str, package: str, won: OffsiteTable | None = None
) -> list[Path]:
    """Write the page of every emulator in a folder, and one on all of them.

    Args:
        folder: of one emulator, or of several.
        owner: what the owner's part of each is called.
        package: the other part.
        won: what tuning on several of them won, by the names of their folders.

    Returns:
        The paths of the pages; that on all of them, where there are several, last.

    Raises:
        ConfigError: there is no emulator, or the table names none of them.
        IncompatibleRunError: they are not of one model, or not judged on one probe.
    """
    homes = [
        home
        for home in [folder, *sorted(folder.iterdir())]
        if is_complete(home / owner, OWNER_KIND)
    ]
    if not homes:
        raise ConfigError(
            f"{folder} holds no emulator",
            where=str(folder),
            why=f"neither it nor a folder in it has a finished {owner}",
            do="name the folder that `selectune emulate` wrote, or one with several of these",
        )
    found = {home: _facts(home / owner, home / package) for home in homes}
    pages = [write_emulator_report(home / owner, facts) for home, facts in found.items()]
    if len(homes) > 1:
        _refuse_strangers(found)
        named = {home.name: facts for home, facts in found.items()}
        pages.append(write_frontier(folder, named, won))
    return pages


def _facts(owner: Path, package: Path) -> EmulatorFacts:
    opened = open_dir(owner, kind=OWNER_KIND)
    record = manifests.read(OwnerRecord, opened, manifests.OWNER)
    unknown = {"quality", "layers", "adapters"} - record.about.keys()
    if unknown:
        raise ConfigError(
            "there is nothing to tell of this emulator",
            where=str(owner / manifests.OWNER),
            why=f"its record does not say: {', '.join(sorted(unknown))}",
            do="make it with `selectune emulate`, which judges what it makes",
        )
    sizes = [file.stat().st_size for file in package.rglob("*") if file.is_file()]
    return EmulatorFacts.of(record.model_dump(mode="json"), sum(sizes) or None)


def _refuse_strangers(found: dict[Path, EmulatorFacts]) -> None:
    first, *others = found.items()
    for home, facts in others:
        losses = [one.quality["losses_nats"]["original"] for one in (first[1], facts)]
        is_other = facts.about["base"] != first[1].about["base"]
        if is_other or not math.isclose(*losses, rel_tol=_SAME):
            raise IncompatibleRunError(
                f"{home.name} and {first[0].name} cannot be compared",
                where=str(home),
                why="they are of different models"
                if is_other
                else f"their model's loss is {losses[1]:.3f} in one and {losses[0]:.3f} in the "
                "other: the probes differ",
                do="keep emulators of one model and one probe in a folder of their own",
            )
