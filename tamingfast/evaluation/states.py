"""The state of a long evaluation: the features of the samples so far, in a file from which it can go on."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from tamingfast.checkpoints.seal import UNSEALED, check_seal, seal
from tamingfast.errors import UserError, first_line
from tamingfast.evaluation.statistics import Features
from tamingfast.files import atomic_write, check_path, locked
from tamingfast.ranks import is_first, wait_for_all

FORMAT = "tamingfast evaluation 1"
#: Seconds between two writings of the file.
EVERY = 60.0


class State:
    """The file of an evaluation, opened with `keeping`: `tick` writes ``found`` when it is due, `save` at once."""

    def __init__(self, path: Path, found: Features, facts: Mapping[str, Any]) -> None:
        self.path, self.found, self.facts = path, found, facts
        self._saved = time.monotonic()

    def tick(self) -> None:
        """Write the file unless that was done within the last minute."""
        if time.monotonic() - self._saved >= EVERY:
            self.save()

    def save(self) -> None:
        """Write the file, atomically; raises UserError where that fails."""
        if not (self.found.count and is_first()):
            return
        metadata = {"format": FORMAT, "facts": json.dumps(self.facts)} | UNSEALED
        with atomic_write(self.path) as temporary:
            save_file(self.found.state(), temporary, metadata=metadata)
            seal(temporary)
        self._saved = time.monotonic()


@contextlib.contextmanager
def keeping(path: str | os.PathLike[str], found: Features, facts: Mapping[str, Any]) -> Iterator[State]:
    """Keep ``found`` in the file while the block adds to it, and at its end, however it ends.

    If the file exists, ``found`` first becomes what it holds. Raises UserError if that is of another evaluation, which
    ``facts``, in values of JSON, tell apart, if it is no such file, and if another process writes it. Of processes that
    work together all read it, and the first writes it.
    """
    check_path("state", path)
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    advice = "wait until it is finished, or give another path"
    with locked(lock, str(path), advice) if is_first() else contextlib.nullcontext():
        if path.exists():
            _restore(path, found, json.loads(json.dumps(facts)))
        wait_for_all()
        state = State(path, found, facts)
        try:
            yield state
        finally:
            state.save()


def _restore(path: Path, found: Features, facts: Mapping[str, Any]) -> None:
    check_seal(path)
    try:
        with safe_open(path, framework="np") as stream:
            metadata = stream.metadata() or {}
            arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        known = json.loads(metadata["facts"]) if metadata.get("format") == FORMAT else None
    except Exception as error:  # whatever safetensors raises
        raise _no_state(path, first_line(error)) from error
    if not isinstance(known, dict):
        raise _no_state(path, "another format")
    for name, value in facts.items():
        if known.get(name) != value:
            raise UserError(
                f"{path}: got samples with {name} {known.get(name)}, expected {value}, as in this evaluation; give "
                "another path, or repeat the settings with which it was begun"
            )
    try:
        found.restore(arrays)
    except ValueError as error:
        raise _no_state(path, first_line(error)) from error


def _no_state(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: got a damaged file or none of ours ({reason}), expected the state of an evaluation; give another path"
    )
