"""The CUDA engine: KV-cached decoding of a GPT on a GPU, without involving the host between tokens.

One step of all sequences (every layer, the token choice, the next input) has a fixed shape. It is captured once per
batch size as a CUDA graph, whose replays are queued without waiting. Up to `FEW` sequences go through kernels that
stream each weight once, more through torch's matrix products. Prompts, and other tokens that are fed several at a
time, go through passes of their own. The kernels are those of ``csrc/cuda``.

Modules below `engine`: `device` (threads, streams, launches, memory), `weights`, `cache` (slots, attention over them),
`passes` and `rows` (tokens that are known), `step` (the graph), `decoding` (the order of work in a call).
"""

from tamingfast.engines.cuda.engine import CudaEngine

__all__ = ["CudaEngine"]
