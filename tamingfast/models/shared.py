"""What layers learn from their inputs without gradients, made the same on all processes that train one model.

Averaged gradients keep the parameters of all processes equal. Moving averages and values that the first batch sets are
computed from the images of one process, so without these functions every process would have its own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes, bit for bit the same on each; alone, leave it as it is."""
    if _several():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def take_from_first_process(*tensors: Tensor) -> None:
    """Replace each tensor by that of the process with rank 0."""
    if _several():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
