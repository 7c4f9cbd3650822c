"""Checks of tensor arguments that the ops share, and how error messages describe a tensor."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(name: str, value: torch.Tensor) -> None:
    """Raise TypeError unless ``value`` is a tensor of one of `FLOATS`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point tensor")


def array(name: str, value: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """(address, bytes) of a tensor for the extension, which takes every array in this form.

    Raises ValueError unless it is contiguous, of that dtype, in the CPU's memory and not a negated view.
    """
    plain = value.layout == torch.strided and value.is_contiguous() and not value.is_neg()
    if value.device.type != "cpu" or value.dtype != dtype or not plain:
        raise ValueError(
            f"{name}: got {'' if plain else 'non-contiguous '}{described(value)}, expected a contiguous {dtype} tensor "
            "on the CPU"
        )
    return value.data_ptr(), value.nbytes


def described(value: torch.Tensor) -> str:
    """Shape, dtype and device in words."""
    return f"{tuple(value.shape)} {value.dtype} on {value.device}"
