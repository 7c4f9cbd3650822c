"""One function per op; each picks the implementation that runs. See :mod:`tamingfast.ops.backends`.

Names are imported on first use, so that ``from tamingfast.ops import backends`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tamingfast.ops.attention import causal_attention
    from tamingfast.ops.codes import nearest_code, quantize
    from tamingfast.ops.norm import group_norm_silu

__all__ = ["causal_attention", "group_norm_silu", "nearest_code", "quantize"]

_HOMES = {
    "causal_attention": "attention",
    "group_norm_silu": "norm",
    "nearest_code": "codes",
    "quantize": "codes",
}
_MODULES = {"backends", "choice", "info", "machine", "reference"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
