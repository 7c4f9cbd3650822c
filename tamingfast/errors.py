"""The one exception type that the command line shows as a sentence instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something a person gave us is wrong; the message is one sentence that says what to do about it."""


def first_line(error: BaseException) -> str:
    """The first line of what the error says, or else its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether the error says that the memory, of the machine or of its GPU, did not suffice."""
    said = ("CUDA out of memory", "DefaultCPUAllocator: ")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(x in str(error) for x in said))


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the valid name closest to ``name``, or an empty string when none is close."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
