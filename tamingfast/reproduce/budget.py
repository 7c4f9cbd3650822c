"""Training budgets in floating-point operations, so that the runs of an experiment are comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COUNTS = ("steps", "warmup_steps", "decay_steps", "log_every", "validate_every", "image_every", "checkpoint_every")


def forward_flops(geometry: Mapping[str, int], tokens: int, vocabulary: int) -> tuple[float, float]:
    """Floating-point operations of linear layers and of attention in a GPT's forward pass over one sequence.

    With L layers of width d, T tokens and a vocabulary of V, linear layers take two operations per token for each
    weight (12 L d^2 in the blocks, V d in the head), attention 4 T^2 d per layer for scores and weighted values.
    """
    layers, width = geometry["n_layer"], geometry["n_embd"]
    linear = 2 * tokens * (12 * layers * width**2 + vocabulary * width)
    return float(linear), float(4 * layers * tokens**2 * width)


def training_flops(geometry: Mapping[str, int], tokens: int, vocabulary: int) -> float:
    """Floating-point operations to train a GPT on one sequence: three times a forward pass."""
    return 3.0 * sum(forward_flops(geometry, tokens, vocabulary))


def scaled(training: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A ``training`` section with all numbers of steps multiplied by ``share``, those between logs or checkpoints too.

    The curves of two runs then have the same number of points.
    """
    return {**training, **{key: max(1, round(training[key] * share)) for key in _COUNTS if training.get(key)}}
