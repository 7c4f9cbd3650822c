"""Training budgets in floating-point operations, by which experiments make runs comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def training_flops(geometry: Mapping[str, int], tokens: int, vocabulary: int) -> float:
    """Floating-point operations to train a GPT on one sequence: three times a forward pass.

    A forward pass is two operations for each weight of a linear layer and token (12 L d^2 in the blocks, V d in the
    head), and 4 T^2 d per layer for scores and weighted values.
    """
    layers, width = geometry["n_layer"], geometry["n_embd"]
    linear = 2 * tokens * (12 * layers * width**2 + vocabulary * width)
    return 3.0 * (linear + 4 * layers * tokens**2 * width)


def scaled(training: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A ``training:`` section with every count of steps multiplied by ``share``, logs and checkpoints included."""
    counts = ("steps", "warmup_steps", "decay_steps", "log_every", "validate_every", "image_every", "checkpoint_every")
    scaled = {key: max(1, round(training[key] * share)) for key in counts if training.get(key)}
    return {**training, **scaled}
