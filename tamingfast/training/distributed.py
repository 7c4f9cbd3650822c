"""Several processes that train one model, started by ``torchrun``.

Each computes the gradients of its share of every batch; the gradients are averaged before the optimizer moves. This is
done here instead of by DistributedDataParallel, whose hooks expect one backward pass per step through one set of
parameters: a GAN step has two, and differentiates twice more by the last layer for the adaptive weight.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tamingfast.errors import UserError

_BUCKET = 1 << 24  # gradient elements averaged in one message: 64 MB in float32


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

    ``device`` None takes a GPU if there is one, else the CPU; "cuda" is the GPU of this process's local rank. Raises
    UserError for a GPU that torch does not find.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if not torch.cuda.is_available():
            raise UserError(f"--device: got {device}, expected a GPU that torch finds; use --device cpu")
        torch.cuda.set_device(device)
    joins = size > 1 and not torch.distributed.is_initialized()
    if joins:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
        if joins:
            # A process that closed its connections while another still works would make gloo's threads abort the other.
            torch.distributed.barrier()
    finally:
        if joins:
            torch.distributed.destroy_process_group()
