"""Several processes that train one model, started by ``torchrun``.

Each computes the gradients of its share of every batch; the gradients are averaged before the optimizer moves. This is
done here instead of by DistributedDataParallel, whose hooks expect one backward pass per step through one set of
parameters: a GAN step has two, and differentiates twice more by the last layer for the adaptive weight.

What a layer learns from its inputs without gradients is shared by the layer itself, see `tamingfast.models.shared`.
Batch norm in the discriminator is the exception: as in the original, each process normalises with the statistics of its
own images, and the running averages, which only a validation uses, are those of the first process.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from tamingfast.errors import UserError, first_line

_BUCKET = 1 << 24  # gradient elements averaged in one message: 64 MB in float32
#: How long the processes wait for one another when they start.
_TO_JOIN = timedelta(minutes=2)
#: How long one may be silent afterwards: the others wait while the first validates, draws and saves.
_TO_ANSWER = timedelta(minutes=30)
_MOST = (1 << 31) - 1


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

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Each value averaged over the processes."""
        stacked = torch.stack([value.detach().float().to(self.device) for value in values.values()])
        if self.size > 1:
            torch.distributed.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).tolist(), strict=True))

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the processes."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for position, gradient in enumerate(gradients):
            bucket.append(gradient)
            if position + 1 == len(gradients) or sum(g.numel() for g in bucket) >= _BUCKET:
                flat = torch.cat([g.reshape(-1) for g in bucket])
                torch.distributed.all_reduce(flat)
                parts = (flat / self.size).split([g.numel() for g in bucket])
                torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])
                bucket = []


@contextlib.contextmanager
def world(device: str | torch.device | None = None) -> Iterator[World]:
    """The processes that ``torchrun`` started, connected inside the block; otherwise this process alone.

    ``device`` None takes a GPU if there is one, else the CPU; "cuda" is the GPU of this process's local rank.

    Raises UserError for a GPU that torch does not find, for a value of torchrun's variables that cannot be followed,
    and when another process does not come, ends early or is silent for too long.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if joined:
        rank, size, local = torch.distributed.get_rank(), torch.distributed.get_world_size(), _local_rank(_MOST)
    else:
        size = _number("WORLD_SIZE", 1, _MOST, 1)
        rank = _number("RANK", 0, size - 1, None if size > 1 else 0)
        local = _local_rank(_number("LOCAL_WORLD_SIZE", 1, size, size))
    found = _device(device, local, size)
    joins = size > 1 and not joined
    if joins:
        _join(rank, size, found)
    try:
        yield World(rank, size, found)
        if joins:
            # A process that closed its connections while another still works would make gloo's threads abort the other.
            torch.distributed.barrier()
    except RuntimeError as error:
        if size == 1 or not _lost(error):
            raise
        raise UserError(
            f"RANK: got no answer from another of the {size} processes ({first_line(error)}), expected all to work "
            "until the end; look for the first error that one of them wrote, then continue with --resume"
        ) from error
    finally:
        if joins:
            torch.distributed.destroy_process_group()


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
            "with torchrun, which sets all of its variables, or unset them to train in one process"
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


def _join(rank: int, size: int, device: torch.device) -> None:
    """Connect this process with the others; UserError if that fails."""
    address, port = os.environ.get("MASTER_ADDR", "").strip(), _number("MASTER_PORT", 1, (1 << 16) - 1, None)
    try:
        if not address:
            raise OSError("no name")
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR: got '{address}' ({first_line(error)}), expected the host name of the process with RANK=0; "
            "start with torchrun, which sets it, or unset WORLD_SIZE to train in one process"
        ) from error
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", rank, size, timeout=_TO_JOIN))
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=_TO_ANSWER
        )
    except (RuntimeError, ValueError) as error:  # torch's, of many kinds: ports in use, no answer, no such interface
        raise UserError(
            f"WORLD_SIZE: got no connection among {size} processes at MASTER_ADDR={address}, MASTER_PORT={port} "
            f"({first_line(error)}), expected all of them to start within {_TO_JOIN.seconds} seconds; start them with "
            "torchrun, or unset WORLD_SIZE to train in one process"
        ) from error


def _lost(error: RuntimeError) -> bool:
    """Whether communication failed: gloo's errors name its source files, torch's have classes of their own."""
    return isinstance(error, torch.distributed.DistError) or bool(re.search(r"\bgloo\b|\bNCCL\b", str(error)))
