"""Orderings of the token grid: the permutations of "An Image is Worth 16x16 Tokens", section 3 and Figure 2.

Each is a module with two buffers, as in the original: ``forward_shuffle_idx[k]`` is the row-major index of the k-th
token of the sequence, ``backward_shuffle_idx`` is the inverse.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast.models.base import at_least


class AbstractPermuter(nn.Module):
    """Base of all orderings: ``forward(x, reverse=False)`` reorders axis 1 of x (B, n, ...)."""

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        raise NotImplementedError


class Identity(AbstractPermuter):
    """Row-major order, for grids of any size."""

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        return x


class _Permutation(AbstractPermuter):
    forward_shuffle_idx: Tensor
    backward_shuffle_idx: Tensor

    def __init__(self, H: int, W: int):
        super().__init__()
        at_least(1, H=H, W=W)
        forward = torch.as_tensor(np.ascontiguousarray(self.order(H, W)), dtype=torch.int64)
        self.register_buffer("forward_shuffle_idx", forward)
        self.register_buffer("backward_shuffle_idx", torch.argsort(forward))

    @staticmethod
    def order(H: int, W: int) -> np.ndarray:
        """Row-major indices in the order in which they are visited, int64 (H*W,)."""
        raise NotImplementedError

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        index = self.backward_shuffle_idx if reverse else self.forward_shuffle_idx
        if x.shape[1] != len(index):
            raise ValueError(f"x: got {x.shape[1]} tokens, expected the {len(index)} of this ordering's grid")
        return x[:, index]


class Subsample(_Permutation):
    """Every prefix of 4^k tokens is a subsampled grid; for square grids of side 2^k."""

    @staticmethod
    def order(H: int, W: int) -> np.ndarray:
        if H != W or H & (H - 1):
            raise ValueError(
                f"grid: got {H} x {W}, expected a square of side 2^k for the subsample ordering; use another"
            )
        index = np.arange(H * W).reshape(1, H, W)
        while index.shape[1] > 1:
            n, h, w = index.shape
            index = index.reshape(n, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3).reshape(n * 4, h // 2, w // 2)
        return index.ravel()


class ZCurve(_Permutation):
    """Morton order: indices sorted by the interleaved bits of row and column."""

    @staticmethod
    def order(H: int, W: int) -> np.ndarray:
        row, column = np.divmod(np.arange(H * W), W)
        code = np.zeros(H * W, dtype=np.int64)
        for bit in range(max(H, W).bit_length()):
            code |= ((column >> bit) & 1) << (2 * bit)
            code |= ((row >> bit) & 1) << (2 * bit + 1)
        return np.argsort(code, kind="stable")


class SpiralIn(_Permutation):
    """From the bottom right corner up, left, down and right along the border, then further and further inwards."""

    @staticmethod
    def order(H: int, W: int) -> np.ndarray:
        # After this flip the walk begins along the first row. Removing that row and rotating the rest by 90 degrees
        # makes the next stretch the first row again.
        rest = np.arange(H * W).reshape(H, W)[::-1, ::-1].T
        stretches = []
        while rest.size:
            stretches.append(rest[0])
            rest = np.rot90(rest[1:])
        return np.concatenate(stretches)


class SpiralOut(_Permutation):
    """The reverse of `SpiralIn`: outwards from the centre, where the main object often is."""

    @staticmethod
    def order(H: int, W: int) -> np.ndarray:
        return SpiralIn.order(H, W)[::-1]


class Random(_Permutation):
    """One fixed random permutation (NumPy's RandomState of seed 1, as in the original)."""

    @staticmethod
    def order(H: int, W: int) -> np.ndarray:
        return np.random.RandomState(1).permutation(H * W)


class AlternateParsing(_Permutation):
    """Row by row, every second row from right to left."""

    @staticmethod
    def order(H: int, W: int) -> np.ndarray:
        index = np.arange(H * W).reshape(H, W)
        index[1::2] = index[1::2, ::-1].copy()
        return index.ravel()
