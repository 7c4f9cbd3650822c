"""Sampling of token grids: which position next, in which window, with which noise, by which engine."""

from __future__ import annotations

from tamingfast.sampling.filters import choose, gumbel_noise, top_k_top_p
from tamingfast.sampling.sampler import sample_grid
from tamingfast.sampling.schedule import Run, Schedule, make_schedule, one_window

__all__ = [
    "Run",
    "Schedule",
    "choose",
    "gumbel_noise",
    "make_schedule",
    "one_window",
    "sample_grid",
    "top_k_top_p",
]
