"""What a caller may have set around a call, none of which may change a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "with torch.device": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def flat(result: object) -> list[Tensor]:
    """All tensors of a result, in order."""
    return [result] if isinstance(result, Tensor) else [value for each in result for value in flat(each)]


def alike(expected: object, got: object) -> None:
    """Fails unless all tensors have the same dtype, device, shape and values."""
    for one, other in zip(flat(expected), flat(got), strict=True):
        assert one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
        assert torch.equal(one, other)
