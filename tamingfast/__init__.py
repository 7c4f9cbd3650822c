"""tamingfast: a fast, modern implementation of "Taming Transformers for High-Resolution Image Synthesis".

Public names are imported on first use, so that ``import tamingfast`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

from tamingfast import renamed

__version__ = "0.1.0"

_HOMES = {
    "VQModel": "models.vqgan",
    "VQSegmentationModel": "models.vqgan",
    "VQNoDiscModel": "models.vqgan",
    "GumbelVQ": "models.vqgan",
    "EMAVQ": "models.vqgan",
    "HierarchicalVQModel": "models.hierarchical",
    "VectorQuantizer": "models.quantize",
    "GumbelQuantize": "models.quantize",
    "GPT": "models.gpt",
    "LlamaGPT": "models.llama_gpt",
    "Net2NetTransformer": "models.prior",
    "MultiscaleTransformer": "models.multiscale",
    "KMeans": "models.color_clusters",
    "load_model": "checkpoints",
    "UserError": "errors",
}
_MODULES = {
    "backends", "checkpoints", "compat", "data", "engines", "evaluation", "multiscale", "ops", "orderings", "reference",
    "sampling", "tasks", "training",
}  # fmt: skip

__all__ = ["__version__", *sorted(_HOMES)]

renamed.install()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
