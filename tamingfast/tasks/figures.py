"""Measures of the difference between two images."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


def l1(real: Tensor, made: Tensor) -> Tensor:
    """Mean absolute difference (B,) of each pair of images, both (B, C, H, W)."""
    return (made - real).abs().mean((1, 2, 3))


def psnr(real: np.ndarray, made: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pixels, uint8 of the same shape; infinite for equal images.

    10 log10(255^2 / MSE), the same as scikit-image's ``peak_signal_noise_ratio``.
    """
    error = float(np.mean((real.astype(np.float64) - made) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf
