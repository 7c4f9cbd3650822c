"""The ``tamingfast`` command.

Each module in `COMMANDS` has an ``add_to(commands)`` that declares its commands and their options; the commands share
the other modules. Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from tamingfast import __version__
from tamingfast.cli import (
    about,
    completion,
    edit,
    encode,
    evaluate,
    image_sets,
    reproduce,
    sample,
    streams,
    together,
    train,
    ui,
)
from tamingfast.cli.arguments import Parser, as_typed, check_paths, one_line
from tamingfast.errors import Elsewhere, Stopped, UserError, in_words
from tamingfast.ops import backends

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
COMMANDS = (
    reproduce,
    train,
    sample,
    edit,
    image_sets,
    evaluate,
    encode,
    ui,
    about,
    completion,
)  # in the order of --help
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _AboveBars(logging.Handler):
    """Writes each message as a line of standard error, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0; 1 for a bug of ours; 2 for what the user can correct; 130 when interrupted. They are
    documented in docs/command-line.md.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = None
    with streams.guarded():
        try:
            os.getcwd()  # raises where it was deleted, which ends some libraries without a word
            _begin_logging()
            with together.quiet_followers():
                arguments = _parse(words)
                check_paths(arguments)
                if arguments.run is not about.info:  # which says what can run here
                    backends.check_environment()
            with together.joined(arguments):
                arguments.run(arguments)
                sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted; commands that take --resume continue from their last checkpoint", file=sys.stderr)
            return INTERRUPTED
        except Stopped as error:
            if not together.follows():
                print(f"tamingfast: {one_line(str(error))}", file=sys.stderr)
            return INTERRUPTED
        except Elsewhere:
            return USAGE_ERROR
        except BrokenPipeError as error:
            # The reader has closed the pipe, as `| head` does.
            return 0 if error.filename == streams.OUTPUT else _failed(error)
        except Exception as error:
            message = in_words(error)
            if message is None:
                return _failed(error)
            print(f"tamingfast: error: {one_line(as_typed(message, arguments, words))}", file=sys.stderr)
            return USAGE_ERROR
    return 0


def _begin_logging() -> None:
    level = os.environ.get("TAMINGFAST_LOG") or "WARNING"
    if level.upper() not in LEVELS:
        raise UserError(f"TAMINGFAST_LOG: got {level!r}, expected one of {', '.join(LEVELS)}")
    logging.basicConfig(format="%(message)s", handlers=[_AboveBars()], level=level.upper())


def _failed(error: Exception) -> int:
    traceback.print_exception(error)
    print(
        "tamingfast: this is a bug of tamingfast; please report it with the lines above and the command",
        file=sys.stderr,
    )
    return FAILED


def _parse(words: list[str]) -> argparse.Namespace:
    # argparse does not accept positional arguments both before and after an option, but that is the natural way to
    # write overrides: train vqgan CONFIG --out DIR training.steps=100.
    top = parser()
    try:
        arguments, rest = top.parse_known_args(words)
    except SystemExit:
        sys.stdout.flush()  # of --help, while a failure can still be told
        raise
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def parser() -> Parser:
    """All commands and their options."""
    top = Parser(prog="tamingfast", description="Train and run VQGANs and their transformers, fast.")
    top.add_argument("--version", action="version", version=f"tamingfast {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_to(commands)
    return top
