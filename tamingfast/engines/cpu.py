"""The native engines: KV-cached decoding of a GPT by the extension, no Python between tokens.

`GPTEngine` works on the CPU, `tamingfast.engines.cuda.CudaEngine` on a GPU; the device of the GPT decides.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tamingfast.engines import cuda as cuda_engine
from tamingfast.engines.cuda import CudaEngine
from tamingfast.engines.request import Span
from tamingfast.ops import backends

DTYPES = ("float32", "bfloat16", "int8")
LOGITS = ("none", "last", "all")
_GEOMETRY = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_unmasked")


def refusal(gpt: nn.Module) -> str | None:
    """Why no engine can run this GPT where it is, None when one can."""
    module, reason = backends.native()
    if module is None:
        return reason
    device = next(gpt.parameters()).device.type
    if device == "cuda":
        return cuda_engine.refusal(gpt)
    return None if device == "cpu" else f"it runs on CPUs and CUDA devices, and the transformer is on {device}"


def dtypes(gpt: nn.Module) -> tuple[str, ...]:
    """Types of weights that the engine of the GPT's device has."""
    return cuda_engine.DTYPES if next(gpt.parameters()).is_cuda else DTYPES


class GPTEngine:
    """A packed copy of a GPT's weights and a cache of keys and values, in slots: one sequence each.

    With "bfloat16" and "int8" (weight-only, one scale for each output channel) the inputs of every linear layer and
    the cache are rounded to bfloat16; sums are float32. Results depend neither on the number of threads nor on what
    else is in a step. One thread at a time works; others wait.

    Args:
        gpt: a `GPT` on the CPU, of any floating type; its weights are copied.
        dtype: of the packed weights: "float32", "bfloat16" or "int8".
        threads: None follows `torch.get_num_threads()` at each call.

    Raises:
        ValueError: an unknown dtype, or threads below 1.
        RuntimeError: the extension is not there, or the GPT is not on the CPU.
        MemoryError: the weights do not fit; the message tells the bytes.
    """

    def __init__(self, gpt: nn.Module, dtype: str = "float32", threads: int | None = None) -> None:
        module, reason = backends.native()
        if module is not None and next(gpt.parameters()).device.type != "cpu":
            module, reason = None, f"it runs on the CPU, and the transformer is on {next(gpt.parameters()).device.type}"
        if module is None:
            raise RuntimeError(f"the CPU engine cannot run this transformer: {reason}")
        self.threads = threads
        self.vocab_size = gpt.config.vocab_size
        self.dtype = dtype
        # Kept until the engine has packed them: a conversion makes new tensors.
        weights = {name: value.detach().to(torch.float32).contiguous() for name, value in gpt.named_parameters()}
        self._native = module.GPTEngine(
            {name: value.data_ptr() for name, value in weights.items()},
            {name: getattr(gpt.config, name, 0) for name in _GEOMETRY},
            dtype,
            self._thread_count(),
            backends.isa(),
        )

    def _thread_count(self) -> int:
        return min(torch.get_num_threads() if self.threads is None else self.threads, 256)

    def reserve(self, slots: int, length: int) -> None:
        """Makes the cache anew: `slots` empty sequences of at most `length` positions. MemoryError tells the bytes."""
        self._native.reserve(slots, length)

    def length(self, slot: int) -> int:
        """How many positions of the slot are valid."""
        return self._native.length(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forgets the slot's positions from `length` on."""
        self._native.truncate(slot, length)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Makes slot `target` hold the first `length` (default: all) positions of slot `source`."""
        self._native.copy(source, target, self.length(source) if length is None else length)

    def step(self, items: Iterable[tuple[int, int, Sequence[int]]], logits: str = "last") -> Tensor:
        """Feeds tokens to slots; the weights are read once for all of them.

        Args:
            items: (slot, start, tokens) each: tokens at positions `start` onwards, where `start` is at most the
                slot's length and cuts it there. Positions that see later ones (`n_unmasked`) come in one piece from 0.
            logits: "last" gives float32 (items, vocab_size), "all" (all tokens, vocab_size), "none" (0, vocab_size).

        Raises:
            ValueError: names the slot, start, position or token that is out of range.
        """
        items = [(slot, start, tokens if isinstance(tokens, list) else list(tokens)) for slot, start, tokens in items]
        rows = {"last": len(items), "all": sum(len(tokens) for _, _, tokens in items)}.get(logits, 0)
        out = torch.empty(rows, self.vocab_size)
        self._native.set_threads(self._thread_count())
        self._native.step(items, logits, out.data_ptr(), rows)
        return out

    def feed(self, tokens: Tensor, spans: Iterable[Span], logits: str = "last") -> Tensor:
        """As `step`, for int64 tokens (T,) of all spans in turn."""
        spans = list(spans)
        parts = tokens.split([span.count for span in spans])
        items = [(span.slot, span.start, part.tolist()) for span, part in zip(spans, parts, strict=True)]
        return self.step(items, logits)

    def decode(
        self,
        slots: Sequence[int],
        sequences: Tensor,
        steps: Sequence[int],
        *,
        wanted: Tensor | None = None,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        images: Sequence[int] | None = None,
        fed: int = 0,
        choices: int | None = None,
        greedy: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        every: int = 1,
    ) -> None:
        """Decodes tokens of several sequences side by side and writes them into `sequences`.

        Args:
            slots: (B,), one for each sequence.
            sequences: contiguous int64 (B, L); what precedes a step is known or is a step itself.
            steps: (S,), rising positions of the tokens to decode, from 1 on.
            wanted: bool (B, S); where False, the token that is there stays.
            rows, columns: (S,), where each token stands in its grid, for the noise; default: row 0, column its step.
            images: (B,), the images' numbers, for the noise; default: 0 onwards.
            fed: leading positions that all slots hold already, from an earlier call with the same tokens.
            choices: only the first so many entries of the vocabulary may be chosen; default: all.
            greedy, temperature, top_k, top_p, seed: as in `tamingfast.ops.choice.choose` and `gumbel_noise`.
            progress: called with the number of steps done, whenever `every` divides it.

        Raises:
            ValueError: names the argument that is wrong; or logits hold NaN.
            KeyboardInterrupt: within 100 ms of Ctrl-C; the slots then hold what is valid.
        """
        if sequences.dtype != torch.int64 or sequences.ndim != 2 or not sequences.is_contiguous():
            raise ValueError(
                f"sequences: got {sequences.dtype} {tuple(sequences.shape)}, expected contiguous int64 (B, L)"
            )
        if len(sequences) != len(slots):
            raise ValueError(f"slots: got {len(slots)}, expected one for each of {len(sequences)} sequences")
        steps = list(map(int, steps))
        if wanted is None:
            wanted = torch.ones(len(slots), len(steps), dtype=torch.bool)
        self._native.set_threads(self._thread_count())
        self._native.decode(
            list(slots),
            sequences.data_ptr(),
            sequences.shape[1],
            fed,
            steps,
            wanted.flatten().tolist(),
            [0] * len(steps) if rows is None else list(rows),
            steps if columns is None else list(columns),
            list(range(len(slots))) if images is None else list(images),
            self.vocab_size if choices is None else choices,
            greedy,
            temperature,
            0 if top_k is None else top_k,
            1.0 if top_p is None else top_p,
            seed,
            progress,
            every,
        )

    def info(self) -> dict[str, int]:
        """weight_bytes (read for every token), cache_bytes, slots, capacity (positions of a slot), threads."""
        return self._native.info()

    def close(self) -> None:
        """Frees the memory; every later call raises ValueError."""
        self._native.close()


_SAMPLED = 512  # elements of a parameter that are compared, at least, where it has so many


class _Snapshot:
    """What a GPT's parameters were when an engine was made of them; equal to another one when they are the same still.

    A write by torch to a parameter, or to what `detach` makes of it, changes its version, and another tensor in its
    place has another address. Writes through `.data`, NumPy, DLPack or an extension change neither. They are seen where
    they change one of the elements that are compared, bit by bit: all of a parameter with fewer than 1024, and 512 to
    1023, evenly apart, of a larger one.
    """

    def __init__(self, gpt: nn.Module) -> None:
        values = list(gpt.parameters())
        # Inference tensors count no versions.
        versions = [(value.data_ptr(), 0 if value.is_inference() else value._version) for value in values]
        self.identity = (backends.isa(), values[0].device, values[0].dtype, *versions)
        with torch.no_grad():  # one launch for some dozens of parameters
            parts = [value.flatten()[:: max(1, value.numel() // _SAMPLED)] for value in values]
            self.sample = torch.cat(parts).view(torch.uint8)  # NaN is equal to itself then

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Snapshot):
            return NotImplemented
        return self.identity == other.identity and torch.equal(self.sample, other.sample)


_engines: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[_Snapshot, GPTEngine | CudaEngine]]] = (
    weakref.WeakKeyDictionary()
)


@contextlib.contextmanager
def borrowed_engine(gpt: nn.Module, dtype: str, slots: int, length: int) -> Iterator[GPTEngine | CudaEngine]:
    """An engine of this GPT with at least that much room, all slots empty, for the caller alone.

    It is kept with the GPT afterwards, so that weights are packed again only after they have changed.
    """
    state = _Snapshot(gpt)
    kept = _engines.setdefault(gpt, {})
    known, engine = kept.pop(dtype, (None, None))
    if known != state:
        if engine is not None:
            engine.close()  # its memory is for its successor
        engine = CudaEngine(gpt, dtype) if next(gpt.parameters()).is_cuda else GPTEngine(gpt, dtype)
    room = engine.info()
    if room["slots"] < slots or room["capacity"] < length:
        engine.reserve(max(slots, 1), length)
    for slot in range(slots):
        engine.truncate(slot, 0)
    try:
        yield engine
    finally:
        kept[dtype] = (state, engine)
