"""Pixels as tokens: a dictionary of RGB colours learned by k-means (after iGPT), the paper's pixel baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.models.base import FirstStage
from tamingfast.models.quantize import Quantised, as_grid


class KMeans(nn.Module):
    """``ncluster`` colours of ``nc`` channels, found in ``niter`` rounds of Lloyd's algorithm.

    Attributes:
        C: the colours, (ncluster, nc).
        initialized: uint8 (), 1 once they have been learned or loaded.
    """

    C: Tensor
    initialized: Tensor

    def __init__(self, ncluster: int = 512, nc: int = 3, niter: int = 10):
        super().__init__()
        self.ncluster, self.nc, self.niter = ncluster, nc, niter
        self.shape = (3, 32, 32)
        self.register_buffer("C", torch.zeros(ncluster, nc))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def is_initialized(self) -> bool:
        """Whether the colours have been learned or loaded."""
        return self.initialized.item() == 1

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Learn the colours from x (N, nc), starting from random rows; empty clusters move to random rows.

        Draws from torch's generator. Raises ValueError for any other shape and for fewer rows than clusters.
        """
        if x.ndim != 2 or x.shape[1] != self.nc or len(x) < self.ncluster:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, {self.nc}) with N at least {self.ncluster}")
        centres = x[torch.randperm(len(x), device=x.device)[: self.ncluster]].contiguous()
        for _ in range(self.niter):
            nearest = ops.nearest_code(x, centres)
            counts = torch.bincount(nearest, minlength=self.ncluster)
            sums = torch.zeros_like(centres).index_add_(0, nearest, x)
            centres = sums / counts.clamp(min=1)[:, None]
            empty = counts == 0
            centres[empty] = x[torch.randperm(len(x), device=x.device)[: int(empty.sum())]]
        self.C.copy_(centres)
        self.initialized.fill_(1)

    def forward(self, x: Tensor, reverse: bool = False, shape: tuple[int, int, int] | None = None) -> Tensor:
        """Images (B, nc, H, W) -> indices (B, H*W); with ``reverse`` indices (B, n) -> images (B, *shape)."""
        if reverse:
            return self.C[x].transpose(1, 2).reshape(len(x), *(self.shape if shape is None else shape))
        flat = x.flatten(2).transpose(1, 2).reshape(-1, self.nc)
        return ops.nearest_code(flat, self.C).view(len(x), -1)


class ColorClusters(FirstStage):
    """A first stage whose tokens are pixels: `KMeans` with the interface of `VQModel`, f = 1."""

    factor: int = 1
    embed_dim: int = 3

    def __init__(self, ncluster: int = 512, niter: int = 10):
        super().__init__()
        self.kmeans = KMeans(ncluster, 3, niter)

    @property
    def n_embed(self) -> int:
        """Number of colours."""
        return self.kmeans.ncluster

    @property
    def quantize(self) -> ColorClusters:
        """The codebook: this object, which has ``get_codebook_entry`` itself."""
        return self

    def encode(self, x: Tensor) -> Quantised:
        """Images (B, 3, H, W) -> ``(nearest colours (B, 3, H, W), 0, (None, None, indices (B, H, W)))``."""
        indices = self.kmeans(x).view(len(x), *x.shape[2:])
        return self.kmeans.C[indices].permute(0, 3, 1, 2).contiguous(), x.new_zeros(()), (None, None, indices)

    def decode(self, quant: Tensor) -> Tensor:
        """Colours (B, 3, H, W), unchanged: they already are the image."""
        return quant

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """Colours of ``indices`` int64 (N,): (B, 3, H, W) if ``shape`` is (B, H, W, 3), (N, 3) if it is None."""
        return as_grid(self.kmeans.C[indices], shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> ``(images in the dictionary's colours, 0)``."""
        quant, loss, _ = self.encode(x)
        return quant, loss
