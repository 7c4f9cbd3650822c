"""Engines: decoding on the CPU or a GPU without Python between tokens, and large images in bands of rows."""

from tamingfast.engines.cpu import GPTEngine
from tamingfast.engines.cuda import CudaEngine
from tamingfast.engines.lending import Engine, borrowed_engine, dtypes, guides, measures_passes, refusal
from tamingfast.engines.request import DecodeRequest, Span

__all__ = [
    "CudaEngine",
    "DecodeRequest",
    "Engine",
    "GPTEngine",
    "Span",
    "borrowed_engine",
    "dtypes",
    "guides",
    "measures_passes",
    "refusal",
]
