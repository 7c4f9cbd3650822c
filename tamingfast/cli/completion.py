"""`tamingfast completion`: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from tamingfast.cli.arguments import output, output_directory, output_or_directory, source
from tamingfast.cli.options import Commands, command

SHELLS = ("bash", "zsh", "fish")


def add_to(commands: Commands) -> None:
    """Declare the command."""
    text = "print the script by which a shell completes commands, options and their values"
    added = command(commands, "completion", completion, text)
    added.add_argument("shell", choices=SHELLS, help="see docs/command-line.md for where each shell keeps it")


def completion(arguments: argparse.Namespace) -> None:
    import shtab

    from tamingfast.cli import parser  # which imports this module

    top = parser()
    files: dict[Callable[[str], str], Any] = {
        source: shtab.FILE,
        output: shtab.FILE,
        output_directory: shtab.DIRECTORY,
        output_or_directory: shtab.FILE,
    }
    words = _words()
    for action in _actions(top):
        kind: Any = action
        if action.type in files:
            kind.complete = files[action.type]
        elif action.option_strings and action.choices is None:
            kind.choices = words.get(action.dest)
    print(shtab.complete(top, arguments.shell))


def _words() -> dict[str, tuple[str, ...]]:
    """The words that options take which are checked only where they have their meaning."""
    from tamingfast.engines.selection import DTYPES, ENGINES
    from tamingfast.evaluation import EFFICIENTNET, INCEPTION
    from tamingfast.sampling.schedule import RULES
    from tamingfast.tasks.exporting import FORMATS

    return {
        "engine": ENGINES, "dtype": DTYPES, "schedule": RULES, "features": (INCEPTION, EFFICIENTNET),
        "format": tuple(FORMATS), "device": ("cpu", "cuda"),
    }  # fmt: skip


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options and positional arguments of a parser and of its commands'."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
