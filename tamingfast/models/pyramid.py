"""Coarse-to-fine scales of a token grid ("An Image is Worth 16x16 Tokens", section 3, "Integrating Multiscale Priors").

"Given a discrete 16 x 16 representation of an image ... we first average pool with a kernel size and stride of 16, 8,
4, 2, respectively, and then re-quantize with the codebook. We then model the image in an autoregressive fashion over
each scale, where each scale representation is unrolled separately." So the codebook vectors of the tokens are pooled:
all scales follow from the finest one, and a token file suffices for training.

The scales are concatenated, coarse to fine, each in row-major order, so token k of the sequence always belongs to the
same scale, row and column. One learned vector per k therefore embeds scale and position, and the paper's transformer,
"identical to the GPT2-medium architecture", has exactly such a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tamingfast import ops
from tamingfast.errors import UserError

#: The paper's kernel sizes, and 1 for the image's own tokens.
FACTORS = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Pyramid:
    """The scales of a token grid as one sequence.

    Attributes:
        factors: kernel size and stride of the average pooling for each scale, decreasing to 1, the grid itself.
        height, width: of the finest scale, in tokens.

    Raises:
        UserError: factors that do not decrease, do not end with 1, or do not divide both sides.
    """

    factors: tuple[int, ...]
    height: int
    width: int

    def __post_init__(self) -> None:
        factors = list(self.factors)
        if not factors or any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in factors):
            raise _scales_error(factors, "positive integers")
        if any(coarse <= fine for coarse, fine in itertools.pairwise(factors)):
            raise _scales_error(factors, "strictly decreasing factors")
        if factors[-1] != 1:
            raise _scales_error(factors, "1, the image's own tokens, as the last factor")
        for factor in factors:
            if self.height % factor or self.width % factor:
                raise UserError(
                    f"scales: got {factor}, expected divisors of a grid of {self.height} x {self.width} tokens; leave "
                    "it out, or use all divisors with scales=all"
                )

    @classmethod
    def of(cls, scales: str | Sequence[int], height: int, width: int) -> Pyramid:
        """The pyramid of a setting: a list of factors, or "all" for those of `FACTORS` that divide both sides.

        Raises UserError for any other setting, and where the class does.
        """
        if scales == "all":
            return cls(tuple(f for f in FACTORS if height % f == 0 and width % f == 0), height, width)
        if not isinstance(scales, Sequence):
            raise _scales_error(scales, "'all' or a list of factors")
        if isinstance(scales, str):
            raise _scales_error(scales, "'all' or a list of factors")
        return cls(tuple(scales), height, width)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of each scale."""
        return [(self.height // factor, self.width // factor) for factor in self.factors]

    @property
    def names(self) -> list[str]:
        """The names of the scales, such as "4x4"."""
        return [f"{rows}x{columns}" for rows, columns in self.shapes]

    @property
    def tokens(self) -> int:
        """Length of the sequence: the tokens of all scales."""
        return self.first(len(self.factors))

    def first(self, scales: int) -> int:
        """Number of tokens of the first ``scales`` scales; UserError if there are fewer scales."""
        if not 0 <= scales <= len(self.factors):
            raise UserError(
                f"scales: got {scales}, expected 0 to {len(self.factors)}, the scales of the model "
                f"({', '.join(self.names)})"
            )
        return sum(rows * columns for rows, columns in self.shapes[:scales])

    def split(self, sequence: Tensor) -> list[Tensor]:
        """A sequence (..., tokens) -> its scales, each (..., rows, columns)."""
        if sequence.shape[-1] != self.tokens:
            raise ValueError(f"sequence: got {sequence.shape[-1]} tokens, expected {self.tokens}")
        parts = sequence.split([rows * columns for rows, columns in self.shapes], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, grids: Sequence[Tensor]) -> Tensor:
        """Scales (..., rows, columns), coarse to fine -> the sequence (..., tokens): the inverse of `split`."""
        if [tuple(grid.shape[-2:]) for grid in grids] != self.shapes:
            raise ValueError(f"grids: got {[tuple(grid.shape) for grid in grids]}, expected {', '.join(self.names)}")
        return torch.cat([grid.flatten(-2) for grid in grids], dim=-1)

    def build(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """Grids of tokens (B, height, width) -> the sequences (B, tokens) of all their scales, int64.

        ``codebook`` (K, D) holds the vectors of the tokens. Raises ValueError for grids of any other size.
        """
        if tuple(tokens.shape[1:]) != (self.height, self.width):
            raise ValueError(f"tokens: got {tuple(tokens.shape)}, expected (B, {self.height}, {self.width})")
        codebook = codebook.float()  # so that the scales do not depend on the dtype of the model
        latents = codebook[tokens].permute(0, 3, 1, 2)
        return self.join([_pooled(latents, factor, codebook) for factor in self.factors[:-1]] + [tokens])


def _pooled(latents: Tensor, factor: int, codebook: Tensor) -> Tensor:
    """Codes (B, h / factor, w / factor) nearest to the means of latents (B, D, h, w) over factor x factor squares."""
    means = F.avg_pool2d(latents, factor).permute(0, 2, 3, 1)
    return ops.nearest_code(means.flatten(0, 2), codebook).view(means.shape[:3])


def _scales_error(got: object, expected: str) -> UserError:
    return UserError(f"scales: got {got!r}, expected {expected}; give them coarse to fine, such as {list(FACTORS)}")
