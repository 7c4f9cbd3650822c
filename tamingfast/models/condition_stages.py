"""Condition stages without weights: a constant token, class labels, coordinates, tokens from the data set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.models.base import Encoded, at_least


class SOSProvider(nn.Module):
    """One constant token as the condition of an unconditional prior."""

    def __init__(self, sos_token: int, quantize_interface: bool = True):
        super().__init__()
        self.sos_token, self.quantize_interface = sos_token, quantize_interface

    def encode(self, x: Tensor) -> Encoded | Tensor:
        """x (B, ...) -> int64 tokens (B, 1); with ``quantize_interface``, ``(tokens, None, (None, None, tokens))``."""
        c = torch.full((x.shape[0], 1), self.sos_token, dtype=torch.int64, device=x.device)
        return (c, None, (None, None, c)) if self.quantize_interface else c


#: Types of devices whose values can be read without waiting for the work that was given to them.
_READ_ON = ("cpu",)


class Labelator(nn.Module):
    """A class label as one token; with ``null_class``, one more token stands for no class.

    ``first`` is the token of class 0.

    Attributes:
        null: the token of no class, for classifier-free guidance; None without one.
    """

    def __init__(self, n_classes: int, quantize_interface: bool = True, null_class: bool = False, first: int = 0):
        super().__init__()
        at_least(1, n_classes=n_classes)
        at_least(0, first=first)
        self.n_classes, self.quantize_interface, self.first = n_classes, quantize_interface, first
        self.null = first + n_classes if null_class else None

    def encode(self, c: Tensor) -> Encoded | Tensor:
        """Labels (B,) -> tokens (B, 1), returned as by `SOSProvider`.

        Raises ValueError for a label outside 0 to n_classes - 1, except in a compiled graph; of labels on a GPU torch
        raises RuntimeError, some time later.
        """
        self._check(c)
        c = c.reshape(-1, 1).long() + self.first
        return (c, None, (None, None, c)) if self.quantize_interface else c

    def _check(self, c: Tensor) -> None:
        if torch.compiler.is_compiling() or not c.numel():  # reading values would break the graph
            return
        if c.device.type in _READ_ON:
            if int(c.min()) < 0 or int(c.max()) >= self.n_classes:
                got = f"{int(c.min())} to {int(c.max())}"
                raise ValueError(f"class label: got {got}, expected 0 to {self.n_classes - 1}")
        else:  # without waiting for the device
            torch._assert_async(((c >= 0) & (c < self.n_classes)).all(), "a class label is out of range")

    def decode(self, c: Tensor) -> Tensor:
        """Tokens (B, 1) -> labels (B,); the original lacks this method, so its ``log_images`` fails."""
        return c.reshape(-1) - self.first


class CoordStage(nn.Module):
    """Coordinates in [0, 1] as tokens: the mean over squares of side ``down_factor``, then ``round(n_embed * c)``.

    The largest token is n_embed itself, so the vocabulary needs n_embed + 1 entries.
    """

    def __init__(self, n_embed: int, down_factor: int):
        super().__init__()
        self.n_embed, self.down_factor = n_embed, down_factor

    def encode(self, c: Tensor) -> Encoded:
        """c (B, 1, H, W) in [0, 1] -> the quantised map (B, 1, h, w) and int64 tokens of the same shape.

        Raises ValueError for other shapes and, except in a compiled graph, for values outside [0, 1].
        """
        if c.ndim != 4 or c.shape[1] != 1:
            raise ValueError(f"coordinates: got shape {tuple(c.shape)}, expected (batch, 1, height, width)")
        if not torch.compiler.is_compiling() and not (c.min() >= 0.0 and c.max() <= 1.0):
            raise ValueError(f"coordinates: got {c.min():g} to {c.max():g}, expected values in [0, 1]")
        c = F.interpolate(c, scale_factor=1 / self.down_factor, mode="area").clamp(0.0, 1.0)
        quantised = (self.n_embed * c).round()
        return quantised, None, (None, None, quantised.long())

    def decode(self, c: Tensor) -> Tensor:
        """The quantised map (B, 1, h, w) -> coordinates (B, 1, H, W)."""
        return F.interpolate(c / self.n_embed, scale_factor=self.down_factor, mode="nearest")


class DummyCondStage(nn.Module):
    """Passes on conditions that the data set already provides as tokens."""

    def __init__(self, conditional_key: str):
        super().__init__()
        self.conditional_key = conditional_key

    @staticmethod
    def encode(c: Tensor) -> Encoded:
        return c, None, (None, None, c)

    @staticmethod
    def decode(c: Tensor) -> Tensor:
        return c

    @staticmethod
    def to_rgb(c: Tensor) -> Tensor:
        return c
