"""How far one image is from another, in figures."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


def l1(real: Tensor, made: Tensor) -> Tensor:
    """Mean absolute difference of images (B, C, H, W), one figure for each: (B,)."""
    return (made - real).abs().mean((1, 2, 3))


def psnr(real: np.ndarray, made: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pixels, uint8 of one shape; infinite for equal images.

    10 log10(255^2 / MSE), as scikit-image's ``peak_signal_noise_ratio`` and the literature have it.
    """
    error = float(np.mean((real.astype(np.float64) - made) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf
