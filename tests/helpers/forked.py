"""Processes of their own that tests may kill.

They are forked from one that has imported the package, as each start of Python takes seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["forked", "warm", "plain_curves", "tamingfast.cli", "tamingfast.training.prior", "tamingfast.training.vqgan",
     "torch._dynamo"]
)  # fmt: skip
_LONGEST = 300  # seconds


class Outcome(NamedTuple):
    """How a process ended: its exit status, -9 when it was killed, and what it wrote to standard error."""

    code: int | None
    error: str


class Forked:
    """The command ``tamingfast`` with these words, in a process of its own.

    ``kill`` (name, n, moment) ends it by SIGKILL when it writes the file ``name`` the n-th time (from 1): as "half" of
    it is written, "before" it gets its name, or "after" that. ``largest`` limits the size of the files that it writes,
    in bytes. ``environment`` are variables to set. Another process without a pulse for ``silence`` seconds is taken as
    lost.
    """

    def __init__(
        self,
        *words: object,
        kill: tuple[str, int, str] | None = None,
        largest: int | None = None,
        environment: Mapping[str, str] | None = None,
        silence: float | None = None,
    ):
        self._files = []
        for _ in range(2):
            handle, name = tempfile.mkstemp()
            os.close(handle)
            self._files.append(name)
        texts = [str(word) for word in words]
        self._process: BaseProcess = _CONTEXT.Process(
            target=_run, args=(texts, kill, largest, environment or {}, silence, self._files), daemon=False
        )
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the signal, unless the process has ended by itself."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Return as soon as ``true()``, while the process runs."""
        end = time.monotonic() + _LONGEST
        while not true():
            assert self.running(), self.outcome()
            assert time.monotonic() < end
            time.sleep(0.005)

    def outcome(self) -> Outcome:
        """Wait for the end."""
        self._process.join(_LONGEST)
        if self.running():
            self.kill()
            self._process.join()
            raise AssertionError(f"still running after {_LONGEST} seconds")
        return Outcome(self._process.exitcode, Path(self._files[1]).read_text(errors="replace"))

    def output(self) -> str:
        """What it has written to standard output."""
        return Path(self._files[0]).read_text(errors="replace")


def _run(
    words: list[str],
    kill: tuple[str, int, str] | None,
    largest: int | None,
    environment: Mapping[str, str],
    silence: float | None,
    files: list[str],
) -> None:
    import torch
    from plain_curves import PLAIN

    from tamingfast import cli
    from tamingfast import ranks as module

    torch.set_num_threads(1)
    PLAIN.start()
    # A process in the background inherits an ignored SIGINT from some shells.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115 (for the rest of the process)
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    module._SILENCE = module._SILENCE if silence is None else silence
    if kill is not None:
        _kill_at(*kill)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.exit(cli.main(words))


def _kill_at(name: str, number: int, moment: str) -> None:
    replace, seen = os.replace, []

    def killed(source: Path, target: Path) -> None:
        seen.extend([source] * (Path(target).name == name))
        if len(seen) != number:
            return replace(source, target)
        if moment == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        if moment == "after":
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killed


def ranks(count: int, *words: object, **options: Any) -> list[Forked]:
    """The command in ``count`` processes that work together, as ``torchrun`` starts them; ``options`` of `Forked`."""
    variables = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    each = [variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Forked(*words, environment=environment, **options) for environment in each]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(count: int, function: Callable[[int], Any], patience: float = 60.0) -> list[Any]:
    """What ``function(rank)``, of a module in tests/helpers, returns in each of ``count`` joined processes.

    ``patience`` is how many seconds they wait for an answer of another.
    """
    with _CONTEXT.Pool(count) as pool:
        port = free_port()
        return pool.starmap(_joined, [(rank, count, port, function, patience) for rank in range(count)], chunksize=1)


def _joined(rank: int, count: int, port: int, function: Callable[[int], Any], patience: float) -> Any:
    import torch

    from tamingfast import ranks

    torch.set_num_threads(1)
    ranks._TO_ANSWER = timedelta(seconds=patience)
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ranks.world("cpu"):
        return function(rank)
