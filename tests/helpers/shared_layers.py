"""Layers that learn from their inputs without gradients, fed with other inputs in each process."""

from __future__ import annotations

import time

import numpy as np
import torch

from tamingfast.models.codebooks import LFQ
from tamingfast.models.discriminator import ActNorm
from tamingfast.models.quantize import EmbeddingEMA
from tamingfast.ranks import World


def latents(rank: int) -> torch.Tensor:
    """Latents (3, 20, 4) for three moves, other ones for each rank."""
    return torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(rank))


def moved(*inputs: torch.Tensor) -> list[np.ndarray]:
    """The averages of a codebook that all ``inputs`` together have moved."""
    torch.manual_seed(0)
    codebook = EmbeddingEMA(8, 4)
    for z in torch.cat(inputs, dim=1):
        codebook.move(z, torch.cdist(z, codebook.weight).argmin(1))
    return [value.numpy() for value in codebook.state_dict().values()]


def codebook(rank: int) -> list[np.ndarray]:
    return moved(latents(rank))


def actnorm(rank: int) -> list[np.ndarray]:
    layer = ActNorm(4)
    layer(latents(rank).movedim(-1, 1)[..., None])
    return [value.detach().numpy() for value in (layer.loc, layer.scale, layer.initialized)]


def entropy(rank: int) -> list[np.ndarray]:
    """The entropy term of two processes' latents (20, 4, 3), and its gradient by this process's."""
    return entropy_of(latents(rank))


def entropy_of(z: torch.Tensor) -> list[np.ndarray]:
    z = (0.1 * z).movedim(0, -1).clone().requires_grad_()  # a temperature at which the assignments are soft
    value = LFQ(16, 4, temperature=0.5).entropy(z)
    value.backward()
    assert z.grad is not None
    return [value.detach().numpy(), z.grad.numpy()]


def every_table(rank: int) -> list[dict[str, int]]:
    """What each process tells the others of the configurations of kernels that it chose."""
    return World(rank, 2, torch.device("cpu")).each({"kernel": rank})


def silent(rank: int) -> None:
    """The second process does not answer the first for a while."""
    time.sleep(8 * rank)
    codebook(rank)
