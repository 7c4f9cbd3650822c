"""Sampling with rejection, as one of several processes or alone."""

from __future__ import annotations

import torch

from tamingfast import tasks


def _classifier(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3)).repeat(1, 4)[:, :10]


def selection(rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and pixels of three images, each chosen among several that are drawn in batches of two."""
    options = tasks.DrawingOptions(batch=2, seed=1)
    found = tasks.sample("demo", 3, label=["ship", "frog"], options=options, accept=0.4, classifier=_classifier)
    return found.canvas.tokens, found.images
