"""The command line's words: numbers and paths with their ranges, and messages that name an option as it was typed."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from tamingfast.errors import UserError
from tamingfast.files import check_directory, check_regular, check_writable
from tamingfast.ops.backends import pick_device
from tamingfast.tasks.options import TEN_CROP

LARGEST = 2**31 - 1  # of a number of images, tokens or pixels


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, which for some commands fills the screen.

    Raises UserError for a value that its type refuses, and exits with status 2 for words that it does not understand.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, exit_on_error=False)

    def parse_known_args(self, *arguments: Any, **settings: Any) -> Any:
        try:
            return super().parse_known_args(*arguments, **settings)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, argparse.ArgumentTypeError):
                refused = f"{error.argument_name}: {error.message}"
                raise UserError(refused) from error
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        message = one_line(message.removeprefix("argument "))
        self.exit(2, f"tamingfast: error: {message}; see `{self.prog} --help`\n")


def whole(least: int, most: int = LARGEST, note: str = "") -> Callable[[str], int]:
    """The type of options that are whole numbers from ``least`` to ``most``; ``note`` is added to the message."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"got {value}, expected at least {least}{note}")
        if value > most:
            raise argparse.ArgumentTypeError(f"got {value}, expected at most {most}")
        return value

    return read


def number(text: str) -> float:
    """The type of options that are numbers; their ranges are checked where their meaning is known."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a number") from None


def guidance(text: str) -> float | str:
    """The type of options that take a scale, alone or with a schedule, which is checked where its meaning is known."""
    try:
        return float(text)
    except ValueError:
        return text


def device(text: str) -> str:
    """The type of options that name a device that works here."""
    try:
        if "LOCAL_RANK" not in os.environ:  # of torchrun, whose processes would all try the first GPU
            pick_device(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device: ")) from error
    return text


def address(text: str) -> str:
    """The type of options that name an address of this machine to listen on."""
    try:
        return text if text == "localhost" else str(ipaddress.IPv4Address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text[:40]!r}, expected an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
        ) from None


def classes(text: str) -> str:
    """The type of options that name classes; which there are is known with the model."""
    if not text.strip() or text.startswith("-"):
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected the name or the number of a class")
    return text


def source(text: str) -> str:
    """The type of options that name what is read, a file or a directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a path")
    return text


def output(text: str) -> str:
    """The type of options that name a file to write."""
    return source(text)


def output_directory(text: str) -> str:
    """The type of options that name a directory to write into."""
    return source(text)


def output_or_directory(text: str) -> str:
    """The type of options that name a file to write or, with another option, a directory to write into."""
    return source(text)


def views(text: str) -> int | str:
    """The type of options that take a number of views, or the word for ten crops."""
    return text if text == TEN_CROP else whole(1, note=f", or {TEN_CROP}")(text)


def check_paths(arguments: argparse.Namespace) -> None:
    """Raise UserError for a path that cannot be used, before anything long is done.

    That is an input that is a pipe or a device, or an output that cannot be written or is an input.
    """
    sources = list(_given(arguments, source))
    for _, path in sources:
        if not os.path.isdir(path):
            check_regular(path, "a file or a directory")
    checks: dict[Callable[[str], str], Callable[[str], object]] = {
        output: check_writable,
        output_directory: check_directory,
        output_or_directory: lambda path: (check_directory if os.path.isdir(path) else check_writable)(path),
    }
    for kind, check in checks.items():
        for action, path in _given(arguments, kind):
            try:
                check(path)
            except UserError as error:
                raise UserError(f"{name_of(action)} {error}" if action.option_strings else str(error)) from error
            for read, other in sources:
                if os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
                    raise UserError(
                        f"{name_of(action)}: got {path}, expected another file than {name_of(read)}, which is kept"
                    )


def _given(arguments: argparse.Namespace, kind: Callable[[str], str]) -> Iterator[tuple[argparse.Action, str]]:
    """The options of a kind with each of their paths."""
    for action in arguments.parser._actions:
        if action.type is kind and (value := getattr(arguments, action.dest)) is not None:
            for path in value if isinstance(value, list) else [value]:
                yield action, path


def as_typed(message: str, arguments: argparse.Namespace | None, words: Sequence[str]) -> str:
    """The message of a task, which names its arguments, with the options that stand for them.

    An argument is what a message begins with, and what it says to do something "with".
    """
    names, colon, rest = message.partition(": ")
    if arguments is None or not colon:
        return message
    typed = {word.partition("=")[0] for word in words}

    def option(name: str) -> str:
        known = [each for each in arguments.parser._actions if name.rstrip("s") == each.dest.rstrip("s")]
        options = [option for action in known for option in action.option_strings]
        return next((each for each in options if each in typed), name_of(known[0]) if options else name)

    rest = re.sub(r"(?<=\bwith )[a-z_]+\b", lambda found: option(found[0]), rest)
    return f"{', '.join(map(option, names.split(', ')))}: {rest}"


def name_of(action: argparse.Action) -> str:
    """An option's longest name; the name of a positional argument."""
    return max(action.option_strings, key=len, default=action.dest)


def one_line(message: str) -> str:
    """The message in one line and without control characters, which names of files may hold."""
    line = re.sub(r"\s*[\r\n]+\s*", " ", message)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], line)
