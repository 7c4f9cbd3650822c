"""Sampling of token grids: the order of cells, their windows, the noise and the engine."""

from __future__ import annotations

from tamingfast.ops.choice import choose, gumbel_noise, top_k_top_p
from tamingfast.sampling.canvas import Canvas
from tamingfast.sampling.sampler import sample_grid
from tamingfast.sampling.schedule import Run, Schedule, Waves, make_schedule, make_waves, one_window

__all__ = [
    "Canvas",
    "Run",
    "Schedule",
    "Waves",
    "choose",
    "gumbel_noise",
    "make_schedule",
    "make_waves",
    "one_window",
    "sample_grid",
    "top_k_top_p",
]
