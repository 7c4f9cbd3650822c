"""`UserError`, which the command line shows as one sentence without a traceback, and helpers for error messages."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

_OUT_OF_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator: ")


class UserError(ValueError):
    """A mistake that the user can correct.

    The message is one sentence, ``<name>: got <value>, expected <valid values>[; <what to do>]``.
    """


class Stopped(UserError):
    """A training run was asked to stop, and saved a state to resume from."""


class SettingError(RuntimeError):
    """A backend or an instruction set was asked for that does not exist or cannot run here."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or the name of its class when the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def brief(value: object, length: int = 80) -> str:
    """``repr(value)`` for a message, cut off after ``length`` signs."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def storage_problem(error: BaseException) -> str | None:
    """What the storage refused, in the system's words ("No space left on device"), None for any other error.

    Understands OSError and the errors of safetensors and of torch's writer, which hide the system's.
    """
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.strerror or os.strerror(cause.errno)
        if cause is not None and (hidden := re.search(r"\(os error (\d+)\)", str(cause))):
            return os.strerror(int(hidden[1]))
    torch_writer = r"PytorchStreamWriter|inline_container|iostream error"
    if isinstance(error, RuntimeError) and re.search(torch_writer, str(error)):
        return "the file cannot be written to its end, as on a full disk"
    return None


def lacks_memory(error: BaseException) -> bool:
    """Whether the error was raised because the host or the GPU ran out of memory."""
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the valid name closest to ``name``, or an empty string when none is close."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
