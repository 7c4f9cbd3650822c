"""The prior over the scales of an image, coarse to fine ("An Image is Worth 16x16 Tokens", section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tamingfast.errors import UserError
from tamingfast.models.orderings import Identity
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.models.pyramid import Pyramid


class MultiscaleTransformer(Net2NetTransformer):
    """A `Net2NetTransformer` whose sequence is a `tamingfast.models.pyramid.Pyramid` of the first stage's tokens.

    ``scales`` are the pooling factors, coarse to fine; ``grid`` is (height, width) of the finest scale in tokens; the
    other arguments are those of the base class. All scales share the codebook. The sequence is sampled as a grid of one
    row, (1, n), so the noise of each token is keyed by row 0 and the token's place in the sequence. Raises UserError
    for an ordering.
    """

    def __init__(self, scales: Sequence[int], grid: Sequence[int], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.permuter, Identity):
            ordering = type(self.permuter).__name__
            raise UserError(
                f"permuter_config: got {ordering}, expected none for a multiscale prior, which is always row-major"
            )
        self.pyramid = Pyramid.of(scales, *grid)

    @torch.no_grad()
    def to_sequence(self, grid: Tensor) -> Tensor:
        """Row-major image tokens (B, h, w) or (B, h*w) -> the tokens of all scales (B, n)."""
        stage, pyramid = self.first_stage_model, self.pyramid
        grid = grid.unflatten(1, (pyramid.height, pyramid.width)) if grid.ndim == 2 else grid
        codes = torch.arange(stage.n_embed, dtype=torch.int64, device=grid.device)
        return pyramid.build(grid, stage.quantize.get_codebook_entry(codes, None))

    def to_grid(self, sequence: Tensor, height: int, width: int) -> Tensor:
        """The tokens of all scales (B, n) -> those of the finest (B, h, w)."""
        return self.pyramid.split(sequence)[-1]

    def canvas_size(self, height: int, width: int) -> tuple[int, int]:
        """(1, n), all scales in a row; UserError for any size but the trained one."""
        trained = (self.pyramid.height, self.pyramid.width)
        if (height, width) != trained:
            raise UserError(
                f"size: got {height} x {width} tokens, expected {trained[0]} x {trained[1]}, the only size that this "
                "multiscale prior draws; leave the size out"
            )
        return 1, self.pyramid.tokens

    def image_tokens(self, canvas: Tensor) -> Tensor:
        """The finest scale (B, h, w) of a canvas (B, 1, n), which holds tokens or other values for each token."""
        return self.pyramid.split(canvas[:, 0])[-1]
