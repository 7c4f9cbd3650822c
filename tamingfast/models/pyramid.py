"""Coarse-to-fine scales of a token grid: the second source's section 3, "Integrating Multiscale Priors".

"Given a discrete 16 x 16 representation of an image ... we first average pool with a kernel size and stride of 16, 8,
4, 2, respectively, and then re-quantize with the codebook. We then model the image in an autoregressive fashion over
each scale, where each scale representation is unrolled separately." What is pooled are therefore the codebook's
vectors of the tokens, so a file of tokens is enough to train on, and every scale follows from the finest one.

The scales stand one after the other, coarse to fine, each row by row, and token k of that sequence always belongs to
the same scale, row and column. One learned vector for each k is thus an embedding of scale and position both, and the
source's transformer, "identical to the GPT2-medium architecture", has just that table.
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

#: The source's kernel sizes, and the image's own tokens.
FACTORS = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Pyramid:
    """The scales of a grid of tokens as one sequence.

    Attributes:
        factors: kernel and stride of the average pooling of each scale, falling to 1, the grid itself.
        height, width: of the finest scale, in tokens.

    Raises:
        UserError: factors that do not fall, do not end with 1, or do not divide both sides.
    """

    factors: tuple[int, ...]
    height: int
    width: int

    def __post_init__(self) -> None:
        given = f"scales are {list(self.factors)}"
        if not self.factors or any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in self.factors):
            raise UserError(f"{given}; expected whole numbers from coarse to fine, such as {list(FACTORS)}")
        if any(coarse <= fine for coarse, fine in itertools.pairwise(self.factors)):
            raise UserError(f"{given}, which do not fall; give them from coarse to fine, such as {list(FACTORS)}")
        if self.factors[-1] != 1:
            raise UserError(f"{given}; the last must be 1, the image's own tokens")
        for factor in self.factors:
            if self.height % factor or self.width % factor:
                raise UserError(
                    f"{given}, but {factor} does not divide a grid of {self.height} x {self.width} tokens; leave it "
                    "out, or take all that do with scales=all"
                )

    @classmethod
    def of(cls, scales: str | Sequence[int], height: int, width: int) -> Pyramid:
        """The pyramid of a setting: factors, or "all" of `FACTORS` that divide both sides. Raises as the class."""
        if scales == "all":
            scales = [factor for factor in FACTORS if height % factor == 0 and width % factor == 0]
        if isinstance(scales, str) or not isinstance(scales, Sequence):
            raise UserError(f"scales are {scales!r}; expected 'all' or a list such as {list(FACTORS)}")
        return cls(tuple(scales), height, width)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of each scale."""
        return [(self.height // factor, self.width // factor) for factor in self.factors]

    @property
    def names(self) -> list[str]:
        """Each scale's name, such as "4x4"."""
        return [f"{rows}x{columns}" for rows, columns in self.shapes]

    @property
    def tokens(self) -> int:
        """Length of the sequence: the tokens of all scales."""
        return self.first(len(self.factors))

    def first(self, scales: int) -> int:
        """Tokens of the first so many scales; UserError when there are fewer."""
        if not 0 <= scales <= len(self.factors):
            raise UserError(
                f"got {scales} scales; the model has {len(self.factors)} ({', '.join(self.names)}): give 0 to "
                f"{len(self.factors)}"
            )
        return sum(rows * columns for rows, columns in self.shapes[:scales])

    def split(self, sequence: Tensor) -> list[Tensor]:
        """A sequence (..., tokens) as its scales, each (..., rows, columns)."""
        if sequence.shape[-1] != self.tokens:
            raise ValueError(f"sequence: got {sequence.shape[-1]} tokens, expected {self.tokens}")
        parts = sequence.split([rows * columns for rows, columns in self.shapes], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, grids: Sequence[Tensor]) -> Tensor:
        """Scales (..., rows, columns), coarse to fine, as a sequence (..., tokens): the inverse of `split`."""
        if [tuple(grid.shape[-2:]) for grid in grids] != self.shapes:
            raise ValueError(f"grids: got {[tuple(grid.shape) for grid in grids]}, expected {', '.join(self.names)}")
        return torch.cat([grid.flatten(-2) for grid in grids], dim=-1)

    def build(self, tokens: Tensor, codebook: Tensor) -> Tensor:
        """The sequence (B, tokens), int64, of grids (B, height, width) whose codes are the rows of ``codebook`` (K, D).

        Raises ValueError for grids of another size.
        """
        if tuple(tokens.shape[1:]) != (self.height, self.width):
            raise ValueError(f"tokens: got {tuple(tokens.shape)}, expected (B, {self.height}, {self.width})")
        codebook = codebook.float()  # whatever the model is stored in: the scales of an image are always the same
        latents = codebook[tokens].permute(0, 3, 1, 2)
        return self.join([_pooled(latents, factor, codebook) for factor in self.factors[:-1]] + [tokens])


def _pooled(latents: Tensor, factor: int, codebook: Tensor) -> Tensor:
    """Codes (B, h / factor, w / factor) nearest to the means of latents (B, D, h, w) over squares of side factor."""
    means = F.avg_pool2d(latents, factor).permute(0, 2, 3, 1)
    return ops.nearest_code(means.flatten(0, 2), codebook).view(means.shape[:3])
