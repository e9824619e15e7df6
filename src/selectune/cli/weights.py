"""The verbs around sparse deltas: merge, export, and verify's part."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectune.cli.shell import DebugOption, JsonOption, Result, perform
from selectune.errors import ConfigError, SelectuneError
from selectune.progress import Progress

if TYPE_CHECKING:
    from torch import nn

OutOption = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where the result goes.", show_default=False)
]
_DELTA = "Folder of a sparse delta."
_TUNED = "adapter"  # the kind of folder that an arm of a run leaves, whatever it trained


class Form(StrEnum):
    """What a delta can be exported to, and what a selection can."""

    shira = "shira"
    model = "model"
    llama_factory = "llama-factory"
    axolotl = "axolotl"


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    for verb in (merge, export):
        app.command(name=verb.__name__)(verb)


def merge(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="The base: a folder or a name on the Hub.", show_default=False
        ),
    ],
    deltas: Annotated[list[str], typer.Argument(metavar="DELTA", help=_DELTA, show_default=False)],
    out: OutOption,
    scale: Annotated[float, typer.Option(help="What every delta is multiplied by.")] = 1.0,
    other_base: Annotated[
        bool,
        typer.Option(
            "--other-base",
            help="Take deltas made on other values of these weights, such as quantised ones.",
        ),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a base with sparse deltas in its weights."""
    perform(
        lambda _: _merged(base, deltas, out, scale, other_base=other_base),
        as_json=as_json,
        is_quiet=True,
    )


def export(
    delta: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of a sparse delta; of a run, for its selection.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="A delta: a SHiRA adapter for peft, or a plain merged model. A selection: rows "
            "and settings for LLaMA-Factory or axolotl.",
        ),
    ],
    out: OutOption,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Of a delta: a folder or a name on the Hub.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a delta, or a selection, for other tools."""

    def action(_: Progress) -> Result:
        if to in (Form.llama_factory, Form.axolotl):
            from selectune.cli import exchange

            return exchange.selection_for(to.value, delta, out, base)
        if base is None:
            raise ConfigError(
                f"--to {to.value} needs the base of the delta",
                where="command line, --base",
                why="a delta is differences, and holds no base",
                do="add --base MODEL",
            )
        if to is Form.model:
            return _merged(base, [delta], out, 1.0)
        from selectune.cli.listing import Listing
        from selectune.weights.shira import export_shira

        made = export_shira(delta, out, base)
        data = {
            "folder": str(out),
            "rank": made.rank,
            "n_entries": made.n_entries,
            "n_stored": made.n_stored,
            "growth": made.growth,
        }
        lines = (
            f"{out}: a SHiRA adapter of rank {made.rank}, which peft loads to the same weights",
            f"  {made.n_stored:,} entries stored for {made.n_entries:,}, {made.growth:.2f} times "
            "as many: SHiRA has one rank for all modules",
        )
        return Listing(data, lines)

    perform(action, as_json=as_json, is_quiet=True)


def is_artefact(path: Path) -> bool:
    """Return whether a folder is one of a sparse delta."""
    return (path / "sparse.json").exists()


def verify_delta(path: Path, base: str | None = None) -> Result:
    """Check every byte of a delta, and that a base is the one that it was made on.

    Args:
        path: folder of the delta.
        base: a folder or a name on the Hub; None checks the delta alone.
    """
    from selectune.cli.listing import Listing
    from selectune.files import MANIFEST, open_dir
    from selectune.weights.delta import SparseDelta
    from selectune.weights.delta_files import KIND
    from selectune.weights.merging import load_base

    problems: list[str] = []
    lines: list[str] = []
    try:
        delta = SparseDelta.load(path)
        if (path / MANIFEST).exists():
            # In a run, the delta is what an arm has tuned, and lies there beside its losses.
            open_dir(path, kind=_TUNED if _is_tuned(path / MANIFEST) else KIND)
        lines.append(f"{path}: every file is what its checksum says")
        lines.append(f"  {delta.n_entries:,} entries in {len(delta.indices)} tensors")
        if base is not None:
            delta.check(load_base(base, delta), where=str(path))
            lines.append(f"  made on {base}, fingerprint {delta.base}")
    except SelectuneError as error:
        problems.append(str(error))
        lines = [f"{path}: 1 problem", *(f"  {line}" for line in str(error).splitlines())]
    data: dict[str, Any] = {"ok": not problems, "folder": str(path), "problems": problems}
    return Listing(data, tuple(lines))


def _is_tuned(manifest: Path) -> bool:
    try:
        return json.loads(manifest.read_bytes())["format"] == f"selectune/{_TUNED}"
    except (ValueError, KeyError, TypeError):
        return False  # whoever opens the folder says what is wrong with it


def _merged(
    base: str, deltas: list[str], out: Path, scale: float, *, other_base: bool = False
) -> Result:
    from selectune.cli.listing import Listing
    from selectune.weights.merged import merged, n_moved
    from selectune.weights.merged_files import OVERWRITTEN, save_merged
    from selectune.weights.merging import merge

    model: nn.Module = merge(base, deltas, scale=scale, other_base=other_base)
    handle = merged(model)
    n_touched = sum(len(p) for p, _ in handle.overwritten.values()) if handle else 0
    moved = n_moved(model)
    tokenizer = _tokenizer(base)
    save_merged(model, out, tokenizer=tokenizer)
    data = {
        "folder": str(out),
        "deltas": deltas,
        "scale": scale,
        "n_touched": n_touched,
        "n_moved": moved,
        "has_tokenizer": tokenizer is not None,
    }
    lines = [
        f"{out}: {base} with {' + '.join(deltas)}" + ("" if scale == 1.0 else f", times {scale}"),
        f"  {n_touched:,} weights touched, {moved:,} of them moved by at least a bit",
        f'  selectune.unmerge("{out}") gives the base back: {OVERWRITTEN} holds what was there',
    ]
    if tokenizer is None:
        lines.append(f"  no tokenizer was found in {base}: copy one there if you need it")
    return Listing(data, tuple(lines))


def _tokenizer(base: str) -> Any:  # noqa: ANN401
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        # A base without a tokenizer is no error: its weights are what was asked for.
        return None
