"""The ``tamingfast`` command.

Each module in `COMMANDS` has an ``add_to(commands)`` that declares its commands and their options; the commands share
the other modules. Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from tamingfast import __version__
from tamingfast.cli import about, edit, encode, evaluate, image_sets, reproduce, sample, train
from tamingfast.errors import SettingError, Stopped, UserError, first_line, lacks_memory
from tamingfast.ops import backends

USAGE_ERROR, INTERRUPTED = 2, 130
COMMANDS = (reproduce, train, sample, edit, image_sets, evaluate, encode, about)  # in the order of --help


class _AboveBars(logging.Handler):
    """Writes each message as a line of standard error, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    level = os.environ.get("TAMINGFAST_LOG", "WARNING").upper()
    logging.basicConfig(format="%(message)s", handlers=[_AboveBars()], level=level)
    arguments = _parse(argv)
    try:
        if arguments.run is not about.info:  # which says what can run here
            backends.check_environment()
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; commands that take --resume continue from their last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does: not an error, and Python must not report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = _for_users(error)
        if message is None:
            raise
        print(f"tamingfast: error: {message}", file=sys.stderr)
        return INTERRUPTED if isinstance(error, Stopped) else USAGE_ERROR
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    # argparse does not accept positional arguments both before and after an option, but that is the natural way to
    # write overrides: train vqgan CONFIG --out DIR training.steps=100.
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _for_users(error: Exception) -> str | None:
    """One sentence for an error that the user can correct; None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if lacks_memory(error):
        return (
            f"memory: got too little ({first_line(error)}), expected enough for the model and its images; use fewer or "
            "smaller images at a time, or a smaller model"
        )
    if isinstance(error, SettingError):
        return str(error)
    return None


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="tamingfast", description="Train and run VQGANs and their transformers, fast.")
    top.add_argument("--version", action="version", version=f"tamingfast {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_to(commands)
    return top
