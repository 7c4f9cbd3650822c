"""One optimizer step of a stage, and its learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tamingfast.errors import UserError
from tamingfast.training.feed import images_per_step
from tamingfast.training.health import gradient_norm
from tamingfast.training.settings import Training
from tamingfast.training.stage import Batch, Loss


def step(
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Callable[[Batch, int], Loss | None],
    batches: Sequence[Batch],
    *,
    device: str = "cpu",
    precision: str = "float32",
    grad_clip: float | None = None,
    averaging: Callable[[Sequence[Tensor], bool], AbstractContextManager[None]] = lambda parameters, last: (
        nullcontext()
    ),
    begin: Callable[[int], object] = lambda number: None,
    check: Callable[[Tensor, Tensor, dict[str, Tensor]], None] = lambda loss, norm, values: None,
) -> dict[str, Tensor]:
    """Move every optimizer once, in the order of the original under Lightning.

    For each batch, and for each optimizer in turn: a forward pass with the current weights, the optimizer's loss, and a
    backward pass into its own parameters only (those of the other optimizers do not require gradients meanwhile); after
    the last batch, its step. So the discriminator learns from reconstructions made after the autoencoder's step.
    Gradients are averaged over the ``batches``. ``begin(number)`` runs before each batch, each forward and backward
    pass inside ``averaging(parameters, last)``, which averages gradients over processes in the last batch, and
    ``check(loss, gradient norm, values)``, all on the device, before each optimizer moves. Nothing here reads a value
    from the device, so a GPU is never waited for. Returns the values of ``loss``, averaged over the batches.
    """
    values: list[dict[str, Tensor]] = [{} for _ in optimizers]
    totals: list[Tensor | float] = [0.0 for _ in optimizers]
    for number, batch in enumerate(batches):
        begin(number)
        last = number + 1 == len(batches)
        for index, optimizer in enumerate(optimizers):
            parameters = _parameters(optimizer)
            with _only(optimizers, optimizer), averaging(parameters, last):
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                    result = loss(batch, index)
                if result is None:
                    continue
                value, seen = result[0] / len(batches), result[1]
                value.backward()
            totals[index] = totals[index] + value.detach()
            for name, item in seen.items():
                values[index][name] = values[index].get(name, 0.0) + item.detach() / len(batches)
            if last:
                check(torch.as_tensor(totals[index]), gradient_norm(parameters), values[index])
                if grad_clip is not None:
                    nn.utils.clip_grad_norm_(parameters, grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return {name: item for seen in values for name, item in seen.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def _only(optimizers: Sequence[torch.optim.Optimizer], chosen: torch.optim.Optimizer) -> Iterator[None]:
    """Parameters of the other optimizers require no gradients inside the block."""
    others = [parameter for other in optimizers if other is not chosen for parameter in _parameters(other)]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def learning_rate(settings: Training, base: float | None, processes: int) -> float:
    """``training.learning_rate``, or the original's rule: accumulate * processes * batch size * base learning rate."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    if not isinstance(base, (int, float)) or base <= 0:
        raise UserError(
            f"model.base_learning_rate: got {base!r}, expected a number above 0 (the paper's is 4.5e-6); set it, or "
            "training.learning_rate"
        )
    return images_per_step(settings, processes) * base


def rate_factor(settings: Training, step: int) -> float:
    """Factor of the learning rate at ``step`` (from 0): linear warm-up times cosine decay, each 1 if not set."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay_steps is None:
        return warm
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / settings.decay_steps)))
