"""The verbs put together, and what every way out of the program looks like.

Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 130 interrupted.
"""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from selectune.cli import exchange, grid, offsite, steps, tools, weights
from selectune.cli.shell import LAUNCH
from selectune.errors import ConfigError, SelectuneError, nearest
from selectune.pipeline.processes import take_launch

# peft imports bitsandbytes where it is installed, which then tells of a kernel to download.
_TALKATIVE = "bitsandbytes.backends.cpu.ops"
# Set before any of these libraries is imported; what the user set stays.
# trl asks huggingface_hub before it pings home, so one switch serves both.
_QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    "TQDM_DISABLE": "1",  # bars of loading and of fetching would break into ours
}

_PACKAGE = Path(__file__).parents[1]

app = typer.Typer(
    name="selectune",
    help="Fine-tune a language model on the part of the data that helps your task.",
    epilog="Start with `selectune demo`. Every verb: selectune VERB recipe.yaml "
    "[section.key=value ...]. Results go to stdout, progress to stderr.",
    add_completion=False,
    no_args_is_help=True,
    # Plain help needs no rich, which alone would take a third of the half second we allow.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
steps.add_to(app)
grid.add_to(app)
weights.add_to(app)
offsite.add_to(app)
exchange.add_to(app)
tools.add_to(app)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"selectune {tools.version()}")
        raise typer.Exit
    return wanted


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: the words after the program's name; None: those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words
    _settle_environment()
    if threading.current_thread() is threading.main_thread():
        # A scheduler's SIGTERM is a polite Ctrl-C: the same way out, the same exit code.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not is_debug:
        sys.excepthook = _report_our_bug
    try:
        verb = _check_verb(words)
        launch = take_launch(os.environ)
        if launch is not None and verb not in (*steps.SHARED, *grid.SHARED):
            if not launch.is_leader:
                return 0
            others = launch.world - 1
            print(f"one process does this; {others} more have nothing to do", file=sys.stderr)
            launch = None
        LAUNCH.set(launch)
        # Calling `app` itself would put typer's own excepthook in place of ours.
        typer.main.get_command(app)(args=words, prog_name="selectune")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except SelectuneError as error:
        if is_debug:
            traceback.print_exception(error)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _settle_environment() -> None:
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger(_TALKATIVE).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def _check_verb(words: list[str]) -> str | None:
    """Return the verb, None where there is none.

    Raises:
        ConfigError: it is not one of ours.
    """
    verbs = [command.name for command in app.registered_commands if command.name]
    first = next((word for word in words if not word.startswith("-")), None)
    if first is None or first in verbs:
        return first
    if first.endswith((".yaml", ".yml")):
        raise ConfigError(
            f'"{first}" stands where the verb belongs',
            where="command line",
            why="the verb comes first",
            do=f"selectune run {first} (or {', '.join(verbs)})",
        )
    raise ConfigError(
        f'"{first}" is no verb of selectune',
        where="command line",
        why=f"the verbs are {', '.join(verbs)}",
        do=nearest(first, verbs),
    )


def _report_our_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say in three lines that something broke which no error of ours foresees."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)]
    # The deepest of our own lines says more than the library's line below it.
    ours = [(file, line) for file, line in frames if Path(file).is_relative_to(_PACKAGE)]
    place = ":".join(map(str, (ours or frames or [("unknown", 0)])[-1]))
    text = " ".join(str(error).split())
    advice = "the same command with --debug shows the traceback; please report it"
    if isinstance(error, MemoryError):
        advice = "make score.token_budget, tune.batch_size or evaluate.token_budget smaller"
    print(
        f"{kind.__name__}: {text[:500] or 'no message'}\n  where: {place}\n  do:    {advice}",
        file=sys.stderr,
    )
