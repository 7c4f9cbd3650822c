"""Ranges of arguments; errors name the argument."""

from __future__ import annotations

import torch


def check_range(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        expected = f"{least} to {most}" if most is not None else f"{least} or more"
        raise ValueError(f"{name}: got {value}, expected {expected}")


def check_options(temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    if not 0 < temperature <= torch.finfo(torch.float32).max:
        raise ValueError(f"temperature: got {temperature}, expected a positive number")
    if top_k is not None:
        check_range("top_k", top_k, 0, (1 << 63) - 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected above 0 and at most 1")
    check_range("seed", seed, 0, (1 << 64) - 1)
