"""The command line: one file per group of verbs, heavy imports inside the verbs."""

from selectune.cli.app import main

__all__ = ["main"]
