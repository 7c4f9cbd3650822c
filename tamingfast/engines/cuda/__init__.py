"""The CUDA engine: KV-cached decoding of a GPT on a GPU, no host between tokens.

One step of all sequences (every layer, the token choice, the next input) has a fixed shape. It is captured once for
each batch size as a CUDA graph, whose replays are queued without waiting for any of them. Up to `FEW` sequences go
through kernels that stream each weight once, more through torch's matrix products. Prompts, and whatever else is fed in
pieces, take a pass of their own. The kernels are those of ``csrc/cuda``.
"""

from tamingfast.engines.cuda.engine import DTYPES, CudaEngine, refusal

__all__ = ["DTYPES", "CudaEngine", "refusal"]
