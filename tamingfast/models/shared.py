"""What depends on all images of a batch, made the same on all processes that train one model.

Averaged gradients keep the parameters of all processes equal. Moving averages, values that the first batch sets and
statistics of a batch are computed from the images of one process, so without these functions every process would have
its own, and several processes would train another model than one does with the same images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from tamingfast.ranks import alone

#: The axes over which statistics of feature maps (B, C, H, W) are taken.
_AXES = (0, 2, 3)


def sum_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes, bit for bit the same on each; alone, leave it as it is."""
    if not alone():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def take_from_first_process(*tensors: Tensor) -> None:
    """Replace each tensor by that of the process with rank 0."""
    if not alone():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def mean_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by its mean over all processes; alone, leave it as it is."""
    if not alone():
        sum_over_processes(*tensors)
        torch._foreach_div_(list(tensors), torch.distributed.get_world_size())


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is that of all their losses together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total


def averaged(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, differentiable by x; alone, x itself."""
    return x if alone() else _Sum.apply(x) / torch.distributed.get_world_size()


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of feature maps (B, C, H, W) of all processes: mean and biased variance (1, C, 1, 1), values per channel ().

    Differentiable by x, where the losses of all processes are added.
    """
    own = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
    sums = _Sum.apply(torch.cat((x.sum(_AXES), own)))
    count = sums[-1].detach()
    mean = (sums[:-1] / count).view(1, -1, 1, 1)
    return mean, (_Sum.apply((x - mean).square().sum(_AXES)) / count).view(1, -1, 1, 1), count


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that in training normalises with the statistics of all processes' images.

    torch's SyncBatchNorm does the same on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (B, C, H, W) -> the same shape and dtype."""
        return super().forward(x) if alone() or not self.training else self._together(x)

    @_disable_dynamo  # torch.compiler.disable would import the compiler at once: half the time of `import tamingfast`
    def _together(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.weight.dtype)
            mean, variance, count = moments(wide)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.flatten(), self.momentum or 0.0)
                self.running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum or 0.0)
            scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
            return ((wide - mean) * scale + self.bias.view(1, -1, 1, 1)).to(x.dtype)
