"""`UserError`, which the command line shows as one sentence without a traceback, and helpers for error messages."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from numbers import Integral

#: From which likeness on a name may be meant, and what keys of the same section have ahead of others.
_LIKE, _NEIGHBOUR = 0.6, 0.15
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: ", "std::bad_alloc")


class UserError(ValueError):
    """A mistake that the user can correct.

    The message is one sentence, ``<name>: got <value>, expected <valid values>[; <what to do>]``.
    """


class Stopped(UserError):
    """A training run was asked to stop, and saved a state to resume from."""


class Elsewhere(UserError):
    """Another of the processes that do one job has failed before this one, and has said why."""


class UnknownKey(UserError):
    """A key of a config that nothing reads.

    ``sentence`` says so; the message ends with the key nearest to ``name`` among ``valid``, all of them whole keys.
    """

    def __init__(self, name: str, sentence: str, valid: Iterable[str]) -> None:
        self.name, self.sentence, self.valid = name, sentence, list(valid)
        found = _nearest_key(name, self.valid)
        super().__init__(sentence + (f"; did you mean '{found}'?" if found else ""))

    def among(self, valid: Iterable[str]) -> UnknownKey:
        """The same error, with more keys that may have been meant."""
        return UnknownKey(self.name, self.sentence, [*self.valid, *valid])


class SettingError(RuntimeError):
    """A backend or an instruction set was asked for that does not exist or cannot run here."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or the name of its class when the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def brief(value: object, length: int = 80) -> str:
    """``repr(value)`` for a message, cut off after ``length`` signs."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def check_count(name: str, value: object, most: int = 2**32 - 1) -> None:
    """Raise UserError about ``name`` unless ``value`` is a whole number from 1 to ``most``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name}: got {brief(value)}, expected a whole number")
    if not 1 <= (number := int(value)) <= most:
        raise UserError(f"{name}: got {brief(value)}, expected {'at least 1' if number < 1 else f'at most {most}'}")


def in_words(error: BaseException) -> str | None:
    """One sentence for an error that the user can correct; None for one that nobody has foreseen, a bug of ours.

    Beside `UserError` these are what the machine refuses: files, memory, a worker process.
    """
    if isinstance(error, (UserError, SettingError)):
        return str(error)
    if lacks_memory(error):
        return (
            f"memory: got too little ({first_line(error)}), expected enough for the model and its images; use fewer or "
            "smaller images at a time, or a smaller model"
        )
    if isinstance(error, ValueError) and str(error).lstrip().startswith("Invalid log settings"):  # on importing torch
        return (
            f"TORCH_LOGS: got {os.environ.get('TORCH_LOGS', '')!r}, expected names of torch's logs; leave it unset, or "
            "give TORCH_LOGS=help, which lists them"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
        return lost_worker(error)
    refused = system_refusal(error)
    if refused is None and isinstance(error, OSError):  # of a library, in its own words
        refused = OSError(None, first_line(error))
    return None if refused is None else storage_sentence(refused)


def lost_worker(error: BaseException) -> str:
    """The sentence for a worker process that ended, which ``error`` showed."""
    return (
        f"training.workers: got a process that ended while it read data ({first_line(error)}), expected it to go on; "
        "it was killed or lacked memory, so free some, or use fewer workers"
    )


def storage_problem(error: BaseException) -> str | None:
    """What the storage refused, in the system's words ("No space left on device"), None for any other error.

    Understands OSError and the errors of safetensors, torch and other libraries, which hide the system's.
    """
    if (refused := system_refusal(error)) is not None:
        return refused.strerror
    if torch_writer_failed(error):
        return "the file cannot be written to its end, as on a full disk"
    return None


def system_refusal(error: BaseException) -> OSError | None:
    """What the system refused, where ``error`` is its error, was caused by it or has it in its text; else None."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        if isinstance(cause, OSError) and isinstance(cause.errno, int):
            return cause if cause.strerror else OSError(cause.errno, os.strerror(cause.errno), cause.filename)
        if not _of_library(cause):
            return None
        if (hidden := _SYSTEM_ERROR.search(str(cause))) is not None:
            number, name = int(hidden["number"]), hidden["name"]
            return OSError(number, os.strerror(number), *([] if name is None else [name]))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def torch_writer_failed(error: BaseException) -> bool:
    """Whether torch failed to write a file; it does not say why."""
    text = str(error)
    written = re.search(r"PytorchStreamWriter|inline_container|iostream error", text)
    return isinstance(error, RuntimeError) and bool(written) and "PytorchStreamReader" not in text


def storage_sentence(error: OSError, name: object = None) -> str:
    """One sentence for what the system refused about ``name``, by default the file that ``error`` names."""
    name = error.filename if name is None else name
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if not isinstance(name, (str, os.PathLike)):
        name = "storage" if _working_directory_exists() else "working directory"
    problem, expected = error.strerror or first_line(error), "a file or directory that can be used"
    return f"{name}: got '{problem}', expected {_EXPECTED.get(error.errno or 0, expected)}"


#: What each refusal of the system lacks.
_EXPECTED = {
    errno.ENOSPC: "room for the file; free some space on that disk, or name another",
    errno.EDQUOT: "a quota with room for the file; delete something, or name another disk",
    errno.EFBIG: "a limit that allows a file of this size; see `ulimit -f`, or name another disk",
    errno.EACCES: "permission to use it",
    errno.EPERM: "permission to use it",
    errno.EROFS: "a file system that can be written",
    errno.EMFILE: "fewer files open at once, or a higher limit; see `ulimit -n`",
    errno.ENFILE: "fewer files open at once on this machine",
    errno.ENOENT: "an existing file or directory",
    errno.ENOTDIR: "a path that leads through directories",
    errno.EISDIR: "a file",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ESTALE: "a file that is still there; the file server has lost it",
    errno.EIO: "a disk that works",
}


#: The system's number in the text of an error: Rust's, Python's as quoted by others, and torch's on shared memory.
_SYSTEM_ERROR = re.compile(
    r"(?:\(os error |\[Errno |(?:open|write|map|resize)\b.*</?torch_.* \()(?P<number>\d+)[\])]"
    r"(?:[^:\n]*: '(?P<name>[^'\n]*)')?"
)


def _of_library(error: BaseException) -> bool:
    """Whether the error is one of a library's, which may stand for the system's; not one of Python's own for bugs."""
    return isinstance(error, OSError) or type(error).__module__ != "builtins" or type(error) is RuntimeError


def _working_directory_exists() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def lacks_memory(error: BaseException) -> bool:
    """Whether the error was raised because the host or the GPU ran out of memory."""
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the valid name closest to ``name``, or an empty string when none is close."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=_LIKE)
    return f"; did you mean '{found[0]}'?" if found else ""


def _nearest_key(name: str, valid: Iterable[str]) -> str | None:
    """The whole key whose last part is most like that of ``name``; None without a likely one, above all elsewhere."""
    section, _, last = name.rpartition(".")

    def likeness(key: str) -> float:
        place, _, word = key.rpartition(".")
        return difflib.SequenceMatcher(None, last, word).ratio() + (_NEIGHBOUR if place == section else 0.0)

    found = max(valid, key=likeness, default=None)
    return found if found is not None and likeness(found) >= _LIKE + _NEIGHBOUR else None
