"""Shared by the tests of `nearest_code` on every backend: values, exact distances, and the check of indices."""

from __future__ import annotations

import torch

_LARGEST = 2**22  # differences held at once in float64: 32 MiB


def normal(
    rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype)


def distances(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distances (N, K) in float64, from the differences."""
    codes = codebook.double()
    rows = max(1, _LARGEST // max(codes.numel(), 1))
    return torch.cat([(part[:, None] - codes).square().sum(2) for part in z.double().split(rows)])


def assert_nearest(index: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor) -> None:
    """Assert that each index is the first with the least distance, up to float64 rounding."""
    assert index.dtype == torch.int64
    assert index.shape == z.shape[:1]
    if not len(z):
        return
    for rows, chosen in zip(z.split(256), index.split(256), strict=True):
        true = distances(rows, codebook)
        assert torch.all(true.gather(1, chosen[:, None]) <= true.min(1, keepdim=True).values * (1 + 1e-13))
        first_equal = (codebook[chosen][:, None] == codebook).all(2).int().argmax(1)
        assert torch.equal(chosen, first_equal), "of equal codes the first must win"
