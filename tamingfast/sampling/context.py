"""Condition tokens in front of a window's image tokens: one for all, a crop of a grid, or one per window."""

from __future__ import annotations

import torch
from torch import Tensor

from tamingfast.sampling.schedule import Schedule


class Context:
    """The condition of each window of a schedule.

    Args:
        cond: int64 (B, c), the same before every window; (B, height, width), cropped with it in raster order, whatever
            the order of the image tokens; or (B, height, width, c), which gives each window the entry at its corner.

    Attributes:
        length: condition tokens before each window.
        fixed: whether they are the same before every window.
    """

    def __init__(self, cond: Tensor, schedule: Schedule):
        self.fixed, self._cropped = cond.ndim == 2, cond.ndim == 3
        self.length = schedule.window_tokens if self._cropped else cond.shape[-1]
        self._tokens = cond if self.fixed else cond.flatten(1, 2)
        self._crop = torch.from_numpy(schedule.offsets.copy()).sort().values.to(cond.device)

    def before(self, corner: int | Tensor, start: int = 0) -> Tensor:
        """Tokens (B, length - start) before the window whose upper left corner is raster index ``corner``.

        For indices (n, 1) they are (B, n, length - start).
        """
        if self._cropped:
            return self._tokens[:, corner + self._crop[start:]]
        if self.fixed:
            found = self._tokens[:, start:]
            return found[:, None].expand(-1, len(corner), -1) if isinstance(corner, Tensor) else found
        return self._tokens[:, corner[:, 0] if isinstance(corner, Tensor) else corner, start:]
