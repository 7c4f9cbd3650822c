"""Several processes that do one job, started by ``torchrun``: how they meet, share work, agree, and end together.

Without torchrun, everything here is for the one process and communicates with nobody. All processes call the functions
of this module in the same order.

One sentence is said by all of them together: the process that fails first says it and tells the others through the
store by which they met. A process that is killed, stopped or cut off says nothing; its neighbour misses its pulse.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from tamingfast.errors import Elsewhere, Stopped, UserError, first_line

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
#: How long the processes wait for one another when they start.
_TO_JOIN = timedelta(minutes=2)
#: How long one may keep the others waiting afterwards, as the first does while it validates, draws and saves.
_TO_ANSWER = timedelta(minutes=30)
#: Seconds between beats of a pulse, without a beat after which a process is lost, and for one that must end to do so.
_BEAT, _SILENCE, _GRACE = 1.0, 40.0, 8.0
_MOST = (1 << 31) - 1
#: Exit status of a process that is ended because another has failed, as of a command that fails.
_ENDED = 2


@dataclass(frozen=True)
class World:
    """This process (``rank``) among the ``size`` that train together, and its device."""

    rank: int
    size: int
    device: torch.device

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, combined by "or" over all processes. Every process must call this."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def agree(self, value: int) -> bool:
        """Whether ``value`` is the same on all processes. Every process must call this."""
        if self.size == 1:
            return True
        ends = torch.tensor([value, -value], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
        largest, least = ends.tolist()
        return largest == -least

    def each(self, value: _Item) -> list[_Item]:
        """The value of each process, which must be picklable, in the order of ranks. Every process must call this."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Each value averaged over the processes."""
        stacked = torch.stack([value.detach().float().to(self.device) for value in values.values()])
        if self.size > 1:
            torch.distributed.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).tolist(), strict=True))


def alone() -> bool:
    """Whether no other process is joined with this one."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def is_first() -> bool:
    """Whether this process writes the files and messages of all that are joined; True without others."""
    return alone() or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Return when all processes have called this."""
    if not alone():
        torch.distributed.barrier()


def in_turns(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """``work(item)`` for each item in order, each computed by one process and given to all.

    This is how work is split: item i is that of process i modulo their number, so results do not depend on it if those
    of ``work`` depend on nothing but the item. Results must be picklable; tensors should be on the CPU. Every process
    must take all of them.
    """
    if alone():
        yield from map(work, items)
        return
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    left = iter(items)
    while turn := list(itertools.islice(left, size)):
        results: list[Any] = [None] * size
        torch.distributed.all_gather_object(results, work(turn[rank]) if rank < len(turn) else None)
        yield from results[: len(turn)]


def take_part(results: Iterable[object]) -> None:
    """Take all that `in_turns` yields and keep nothing, on a process that writes no file of it."""
    collections.deque(results, maxlen=0)


@contextlib.contextmanager
def world(device: str | torch.device | None = None) -> Iterator[World]:
    """The processes that ``torchrun`` started, connected inside the block; otherwise this process alone.

    ``device`` None takes a GPU if there is one, else the CPU; "cuda" is the GPU of this process's local rank.

    Raises UserError for a GPU that torch does not find, for a value of torchrun's variables that cannot be followed,
    and when another process does not come, ends early or is silent for too long; its subclass `Elsewhere` in place of
    any error if another process has failed before. A process that cannot raise, because it waits inside a library for
    one that is lost, writes the sentence to standard error and ends with status 2.
    """
    joined = not alone()
    if joined:
        rank, size, local = torch.distributed.get_rank(), torch.distributed.get_world_size(), _local_rank(_MOST)
    else:
        size = _number("WORLD_SIZE", 1, _MOST, 1)
        rank = _number("RANK", 0, size - 1, None if size > 1 else 0)
        local = _local_rank(_number("LOCAL_WORLD_SIZE", 1, size, size))
    among = World(rank, size, _device(device, local, size))
    if size == 1 or joined:
        yield among
        return
    pulse = _Pulse(rank, size, _join(rank, size, among.device))
    pulse.start()
    try:
        try:
            yield among
        except Stopped:  # by agreement
            pulse.part()
            raise
        pulse.part()
    except Stopped:
        raise
    except BaseException as error:
        if not pulse.may_tell():
            raise Elsewhere(_silence(size, "it has said why")) from error
        if isinstance(error, RuntimeError) and _lost(error):
            raise UserError(_silence(size, first_line(error))) from error
        raise
    finally:
        pulse.end()
        torch.distributed.destroy_process_group()


def _silence(size: int, why: str) -> str:
    return (
        f"RANK: got no answer from another of the {size} processes ({why}), expected all to work until the end; look "
        "for the first error that one of them wrote, then run it again, a training with --resume"
    )


class _Pulse(threading.Thread):
    """Beats while this process lives, and listens to that of the next one and for the failure of any.

    The main thread cannot do this, because it may wait inside a library for the process that is lost.
    """

    def __init__(self, rank: int, size: int, store: torch.distributed.Store) -> None:
        super().__init__(daemon=True)
        # A connection of its own: a client waits for the answer to one request before it sends another.
        self.store = torch.distributed.PrefixStore("pulse", store.clone())  # type: ignore[attr-defined]
        self.store.set_timeout(timedelta(seconds=_SILENCE))
        self.own, self.next, self.others = f"beat {rank}", f"beat {(rank + 1) % size}", size - 1
        self.over = threading.Event()
        self.telling = threading.Lock()
        self.informed = False

    def run(self) -> None:
        heard, since = -1, time.monotonic()
        while not self.over.wait(_BEAT):
            try:
                self.store.add(self.own, 1)
                beats, failures = self.store.add(self.next, 0), self.store.add("failures", 0)
            except RuntimeError as error:  # the store is lost, and with it the process or the agent that kept it
                self._end(first_line(error))
                return
            if failures:
                self._acknowledge()
                self._end(None)
                return
            if beats != heard:
                heard, since = beats, time.monotonic()
            elif time.monotonic() - since > _SILENCE:
                self._end(f"none for {_SILENCE:.0f} seconds", at_once=True)
                return

    def may_tell(self) -> bool:
        """Whether this process is the first that fails, and so says why; the others are then informed."""
        self.telling.acquire()  # for good: the process fails, and needs no second sentence
        self.end()
        if self.informed:
            return False  # without another question, as the store may be gone
        try:
            if self.store.add("failures", 1) > 1:
                self._acknowledge()
                return False
            # If the store is in this process, it must not end before the others know.
            end = time.monotonic() + 2 * _BEAT + 1
            while self.store.add("informed", 0) < self.others and time.monotonic() < end:
                time.sleep(_BEAT / 10)
        except RuntimeError:
            pass  # nobody can be asked
        return True

    def part(self) -> None:
        """Return when all processes have finished their work and none listens any more."""
        # One that closed its connections while another still works would make gloo's threads abort the other.
        torch.distributed.barrier()
        self.end()
        torch.distributed.barrier()

    def _acknowledge(self) -> None:
        """Say once that this process knows of a failure: the last that it asks of the store, which may then end."""
        if not self.informed:
            self.informed = True
            with contextlib.suppress(RuntimeError):
                self.store.add("informed", 1)

    def _end(self, why: str | None, at_once: bool = False) -> None:
        """End the process unless it ends by itself; with the reason if nobody else has told one."""
        if self.over.wait(0 if at_once else _GRACE) or not self.telling.acquire(blocking=False):
            return
        if why is not None:
            with contextlib.suppress(RuntimeError):
                why = None if self.store.add("failures", 1) > 1 else why
        if why is not None:
            print(f"tamingfast: error: {_silence(self.others + 1, why)}", file=sys.stderr, flush=True)
            time.sleep(2 * _BEAT)  # the others must hear of it before the store is gone
        os._exit(_ENDED)

    def end(self) -> None:
        """Stop beating and listening."""
        self.over.set()
        self.join(_GRACE)


def _number(name: str, least: int, most: int, default: int | None) -> int:
    """The integer in an environment variable, ``default`` if that is not set or empty; UserError for any other text."""
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    value = int(text) if re.fullmatch("[0-9]{1,10}", text) else -1
    if not least <= value <= most:
        valid = f"an integer from {least} to {most}" if least < most else str(least)
        raise UserError(
            f"{name}: got {repr(text) if text else 'nothing'}, expected {valid} in this environment variable; start "
            "with torchrun, which sets all of its variables, or unset them to work in one process"
        )
    return value


def _local_rank(processes: int) -> int:
    return _number("LOCAL_RANK", 0, processes - 1, None if torch.cuda.is_available() and processes > 1 else 0)


def _device(device: str | torch.device | None, local_rank: int, size: int) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device: got {device}, expected a GPU that torch finds; use --device cpu")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        name = "--device" if device.index is not None else "LOCAL_RANK"
        raise UserError(
            f"{name}: got GPU {index}, expected one of the {torch.cuda.device_count()} that torch finds, from 0; start "
            "at most one process for each of them"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _join(rank: int, size: int, device: torch.device) -> torch.distributed.Store:
    """Connect this process with the others, and return the store by which they met; UserError if that fails."""
    address, port = os.environ.get("MASTER_ADDR", "").strip(), _number("MASTER_PORT", 1, (1 << 16) - 1, None)
    try:
        if not address:
            raise OSError("no name")
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR: got '{address}' ({first_line(error)}), expected the host name of the process with RANK=0; "
            "start with torchrun, which sets it, or unset WORLD_SIZE to work in one process"
        ) from error
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", rank, size, timeout=_TO_JOIN))
        # What is on a CPU goes by gloo beside a GPU, too.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TO_ANSWER)
        return store
    except (RuntimeError, ValueError) as error:  # torch's, of many kinds: ports in use, no answer, no such interface
        raise UserError(
            f"WORLD_SIZE: got no connection among {size} processes at MASTER_ADDR={address}, MASTER_PORT={port} "
            f"({first_line(error)}), expected all of them to start within {_TO_JOIN.seconds} seconds; start them with "
            "torchrun, or unset WORLD_SIZE to work in one process"
        ) from error


def _lost(error: RuntimeError) -> bool:
    """Whether communication failed: gloo's errors name its source files, torch's have classes of their own."""
    return isinstance(error, torch.distributed.DistError) or bool(re.search(r"\bgloo\b|\bNCCL\b", str(error)))
