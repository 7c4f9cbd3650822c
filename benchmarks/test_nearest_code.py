"""nearest_code against the best that torch's own operators give, each in its best chunking."""

from __future__ import annotations

import functools

import pytest
import torch

from tamingfast import ops

ROWS_PER_CHUNK = (2048, None)  # None: the whole N x K matrix at once
LARGEST_MATRIX = 2**30  # bytes; a whole matrix larger than this is left out


def cdist(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.cdist(z, codebook).argmin(1)


def addmm(z: torch.Tensor, codebook: torch.Tensor, half_norms: torch.Tensor) -> torch.Tensor:
    return torch.addmm(half_norms, z, codebook.t(), alpha=-1).argmin(1)


def in_chunks(formula, z: torch.Tensor, rows: int | None) -> torch.Tensor:
    return torch.cat([formula(chunk) for chunk in z.split(rows or len(z))])


def torch_formulas(z: torch.Tensor, codebook: torch.Tensor) -> dict:
    rivals = {}
    for rows in ROWS_PER_CHUNK:
        if (rows or len(z)) * len(codebook) * z.element_size() > LARGEST_MATRIX:
            continue
        suffix = f", {rows} rows" if rows else ", whole"
        rivals[f"cdist{suffix}"] = lambda rows=rows: in_chunks(lambda chunk: cdist(chunk, codebook), z, rows)

        def expanded(rows: int | None = rows) -> torch.Tensor:
            half_norms = codebook.square().sum(1) / 2
            return in_chunks(lambda chunk: addmm(chunk, codebook, half_norms), z, rows)

        rivals[f"addmm{suffix}"] = expanded
    return rivals


def validate(index: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor) -> None:
    """Of a sample of rows, the chosen code is the nearest in float64."""
    sample = torch.linspace(0, len(z) - 1, 512, device=z.device).long()
    distance = torch.cdist(z[sample].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distance.gather(1, index[sample, None]).squeeze(1)
    torch.testing.assert_close(chosen, distance.min(1).values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(256, 1024, 256), (65536, 1024, 256), (65536, 16384, 256), (65536, 512, 3)],
    ids=["one image", "batch", "batch, large codebook", "pixels to 512 colours"],
)
def test_nearest_code(compare, n, k, d, device):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator).to(device)
    codebook = torch.randn(k, d, generator=generator).to(device)
    ours = functools.partial(ops.nearest_code, z, codebook)
    rivals = torch_formulas(z, codebook)
    for run in (ours, *rivals.values()):
        validate(run(), z, codebook)
    compare(ours, rivals, device, flop=2 * n * k * d, size=4 * (n * d + k * d) + 8 * n, rounds=3)
