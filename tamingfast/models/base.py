"""What the original's models inherit from Lightning and other code uses, on a plain torch module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Module(nn.Module):
    """A torch module with the attributes that code written for the original reads and sets.

    ``learning_rate`` and ``global_step`` belong to whoever trains the model; ``logged`` holds the latest value of
    everything that a training or validation step has reported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.0
        self.global_step = 0
        self.logged: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Remember a value; Lightning's further arguments are accepted and unused."""
        self.logged[name] = value.detach() if isinstance(value, Tensor) else value

    def log_dict(self, values: Mapping[str, Any], **kwargs: Any) -> None:
        """Remember several values; Lightning's further arguments are accepted and unused."""
        for name, value in values.items():
            self.log(name, value)


class FirstStage(Module):
    """What turns images into tokens and back, one token for ``factor`` x ``factor`` pixels.

    Images of (H, W) pixels become (rows, columns) tokens, which a prior models in raster order. ``levels`` counts the
    grids over the image that these consist of: with one, a token's row and column are its place in the image.
    """

    factor: int
    levels = 1

    @property
    def pixels_per_token(self) -> float:
        """Pixels of an image over its tokens."""
        return self.factor**2 / math.prod(self.grid(self.factor, self.factor))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (rows, columns) of an image of so many pixels; what ``factor`` does not divide is cut off."""
        return height // self.factor, width // self.factor

    def footprint(self, tokens: Tensor) -> Tensor:
        """The pixels that some tokens stand for: bool (B, rows, columns) -> bool (B, 1, H, W)."""
        return tokens[:, None].repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def at_least(least: int, **numbers: int) -> None:
    """ValueError naming the first of the ``numbers`` below ``least``: torch builds networks of nothing in silence."""
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"got {name}={value}; expected at least {least}")


def image_from_batch(batch: Mapping[str, Tensor], key: str) -> Tensor:
    """``batch[key]`` from (B, H, W, C) or (B, H, W) to a contiguous (B, C, H, W); other ranks pass unchanged."""
    x = batch[key]
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    return x
