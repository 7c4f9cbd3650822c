"""``metrics.jsonl``, the recorded values of a training run: one JSON object per line with step, epoch and split."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from tamingfast.errors import UserError, first_line, storage_sentence
from tamingfast.files import open_regular, reported

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Metrics:
    """``metrics.jsonl``: one JSON object per line with step, epoch, split and values, on disk after each.

    Attributes:
        ended: whether the file holds the validation at the end of a finished run.
    """

    def __init__(self, out: Path, keep_bytes: int, last_step: int | None = None):
        """Open the file of the run in ``out`` for appending, truncated to ``keep_bytes``, the checkpoint's `size`.

        ``last_step`` is the step of a finished run: the line that it wrote after its checkpoint is kept, too.
        """
        self._path, self.ended = out / METRICS, False
        with reported(self._path):
            self._stream = open(self._path, "ab+", buffering=0)  # noqa: SIM115 (closed by close)
            size = os.fstat(self._stream.fileno()).st_size
            if size < keep_bytes:
                logger.warning("%s: %d of %d bytes are missing; the run continues without them",
                               self._path, keep_bytes - size, keep_bytes)  # fmt: skip
            self._stream.seek(0)
            content = self._stream.read()
            end = content.rfind(b"\n", 0, keep_bytes) + 1
            line, newline, _ = content[keep_bytes:].partition(b"\n")
            if newline and last_step is not None and end == keep_bytes and _step_of(line) == last_step:
                self.ended, end = True, keep_bytes + len(line) + 1
            if end < size:
                self._stream.truncate(end)

    def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
        """Append a line. Raises UserError when that fails, as on a full disk, and where `check_place` does."""
        self.check_place()
        rest = json.dumps({"step": step, "epoch": epoch, "split": split, **values}).encode() + b"\n"
        with reported(self._path):
            while rest:
                rest = rest[self._stream.write(rest) :]

    def size(self) -> int:
        """Length of the file in bytes, all of it on disk. Raises UserError where `write` does."""
        self.check_place()
        with reported(self._path):
            os.fsync(self._stream.fileno())
            return os.fstat(self._stream.fileno()).st_size

    def check_place(self) -> None:
        """Raise UserError when the run directory, or this file in it, has been moved, replaced or removed."""
        try:
            same = os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self._path))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self._path}: got a file or directory that was moved or removed during the training, expected it to "
                "stay in place; continue from the last checkpoint with --resume --out and its present place"
            )

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: bytes) -> int | None:
    """The step of a line of ``metrics.jsonl``; None for a damaged one."""
    try:
        return _parsed(line)["step"]
    except ValueError:
        return None


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of ``metrics.jsonl``; ValueError for a damaged one."""
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise ValueError("line: got brackets nested too deep, expected one object") from error
    if not isinstance(found, dict) or not isinstance(found.get("step"), int) or "split" not in found:
        raise ValueError("line: got no 'step' or no 'split', expected both")
    return found


def read_metrics(out: str | os.PathLike, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` as dicts, of all splits or of one.

    A last line that is not complete, as a killed run leaves it, is passed over. Raises UserError when the file is
    missing, unreadable or damaged.
    """
    path, lines = Path(out) / METRICS, []
    try:
        with open_regular(path) as stream:
            content = stream.read()
    except OSError as error:
        raise UserError(storage_sentence(error, path)) from error
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            lines.append(_parsed(line))
        except ValueError as error:
            if line.endswith(b"\n"):
                raise UserError(
                    f"{path}: got a damaged line {number} ({first_line(error)}), expected JSON; remove the line, or "
                    "restore a copy of the file"
                ) from error
    return [line for line in lines if split in (None, line["split"])]
