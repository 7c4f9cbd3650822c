"""What runs a network without Python between its layers: the CPU engine, the CUDA engine, bands of rows."""

from tamingfast.engines.cpu import GPTEngine
from tamingfast.engines.cuda import CudaEngine
from tamingfast.engines.lending import Engine, borrowed_engine, dtypes, refusal
from tamingfast.engines.request import DecodeRequest, Span

__all__ = ["CudaEngine", "DecodeRequest", "Engine", "GPTEngine", "Span", "borrowed_engine", "dtypes", "refusal"]
