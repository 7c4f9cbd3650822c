"""Colours for labels and limbs."""

from __future__ import annotations

import colorsys
import math

import numpy as np


def label_colors(count: int) -> np.ndarray:
    """float32 (count, 3) in [-1, 1]: a label's colour does not depend on ``count``, and neighbours differ clearly."""
    golden = (math.sqrt(5) - 1) / 2
    colors = [colorsys.hsv_to_rgb(n * golden % 1, 0.65, 1.0 - 0.25 * (n // 8 % 3)) for n in range(count)]
    return np.array(colors, np.float32) * np.float32(2) - np.float32(1)


def hues(count: int) -> list[tuple[int, int, int]]:
    """``count`` evenly spaced, fully saturated colours as 8-bit RGB."""
    colors = [[round(255 * c) for c in colorsys.hsv_to_rgb(n / count, 1.0, 1.0)] for n in range(count)]
    return [(red, green, blue) for red, green, blue in colors]
