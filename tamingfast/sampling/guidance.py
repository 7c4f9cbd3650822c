"""Classifier-free guidance: each token is chosen from logits pushed away from those of the null class.

A second sequence holds the null class before the same image tokens, and a token's logits are

    null + (own - null) * scale

in float32, before temperature and filters. Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6;
for logits, Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", 2024, section 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from tamingfast.errors import UserError
from tamingfast.ops.choice import guided
from tamingfast.sampling.plan import GridPlan

#: How the scale changes from a grid's first token to its last: not at all, or along half a cosine from 1 on (as in Gao
#: et al., "MDTv2", 2023, with power 1).
SCHEDULES = ("constant", "cosine")
MOST = 1000.0


def check_cfg(cfg: object) -> tuple[float, str] | None:
    """(scale, schedule) of a scale, or of text such as "4" or "4:cosine"; None for no guidance, which scale 1 is.

    Raises UserError for anything else.
    """
    if cfg is None:
        return None
    number, colon, schedule = cfg.partition(":") if isinstance(cfg, str) else (cfg, "", "")
    schedule = schedule if colon else SCHEDULES[0]
    try:
        scale = float(number) if isinstance(number, str | Real) and not isinstance(number, bool) else math.nan
    except ValueError:
        scale = math.nan
    if not 0.0 <= scale <= MOST or schedule not in SCHEDULES:
        raise UserError(
            f"cfg: got {cfg!r}, expected a scale from 0 to {MOST:g}, alone or with a schedule "
            f"({', '.join(SCHEDULES)}), such as 4 or 4:cosine"
        )
    return None if scale == 1.0 else (scale, schedule)


@dataclass(frozen=True, eq=False)
class Guidance:
    """The guidance of a grid, or none.

    Attributes:
        null: the token that stands in place of the condition's in the second sequence.
        prefix: number of the condition's tokens.
        scales: float32 (height * width,), the scale of each cell by its raster index; None without guidance.
    """

    null: int = 0
    prefix: int = 0
    scales: Tensor | None = None

    @classmethod
    def of(cls, cfg: float | str | None, plan: GridPlan) -> Guidance:
        """The guidance that ``cfg`` asks for; UserError for an unknown one, and for a prior without a null class."""
        wanted = check_cfg(cfg)
        if wanted is None:
            return cls()
        if plan.null is None:
            raise UserError(
                f"cfg: got {cfg}, expected None or 1, as this prior has no null class; train one with "
                "prior.class_dropout=0.1"
            )
        scale, schedule = wanted
        cells = plan.schedule.positions()
        rising = (1 - np.cos(np.pi * np.arange(len(cells)) / max(len(cells) - 1, 1))) / 2
        scales = np.empty(len(cells), dtype=np.float32)
        scales[cells] = scale if schedule == "constant" else 1 + (scale - 1) * rising
        return cls(plan.null, plan.context.length, torch.from_numpy(scales).to(plan.device))

    @property
    def copies(self) -> int:
        """Sequences that are fed for each image."""
        return 1 if self.scales is None else 2

    def beside(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (B, T) at positions from ``start`` on, followed by those of the second sequences: (copies * B, T)."""
        if self.scales is None:
            return tokens
        second = tokens.clone()
        second[:, : max(self.prefix - start, 0)] = self.null
        return torch.cat((tokens, second))

    def combined(self, logits: Tensor, cells: Tensor) -> Tensor:
        """Logits (B, n, V) of cells, raster indices (n,) or (B, n), from those of all sequences (copies * B, n, V)."""
        if self.scales is None:
            return logits
        own, null = logits.chunk(2)
        return guided(own, null, self.scales[cells][..., None])
