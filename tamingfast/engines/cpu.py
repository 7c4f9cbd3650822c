"""The CPU engine: KV-cached decoding of a GPT by the extension, without Python between tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tamingfast.engines.networks import Transformer, checked_parameters, kind_of
from tamingfast.engines.request import (
    Asked,
    DecodeRequest,
    Items,
    Room,
    Span,
    asked_of,
    check_range,
    check_reserve,
    spans_of,
)
from tamingfast.errors import SettingError
from tamingfast.ops import backends, check
from tamingfast.ops.choice import check_chosen

_GEOMETRY = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_unmasked")
_KIND = ("extra_tokens", "hidden", "rms_norm", "gated", "rotary", "biases", "qk_norm")
_MOST_THREADS = 256
#: Of which the width of a gated MLP must be a multiple, and that of a head with rotary positions.
_PANEL, _PAIR = 32, 2


class GPTEngine:
    """A packed copy of a GPT's weights and a cache of keys and values in slots, one sequence each.

    With "bfloat16" and "int8" (weights only, one scale per output channel) the inputs of every linear layer and the
    cache are rounded to bfloat16; sums are float32. Results depend neither on the number of threads nor on the other
    sequences of a step. One thread works at a time; others wait.

    Args:
        gpt: on the CPU, of any floating-point type; its weights are copied.
        dtype: type of the packed weights, one of `DTYPES`.
        threads: number of threads; None takes `torch.get_num_threads()` at each call.
        drafts: keep an int8 copy of the weights as well, with a cache of its own, by which `decode` guesses tokens
            where that is faster. The tokens are those of ``dtype``. Without the memory for its cache there is none.

    Raises:
        ValueError: an unknown dtype, threads below 1, or parameters of other shapes than the GPT's config says.
        RuntimeError: the engine cannot run this GPT; see `refusal`.
        MemoryError: the weights do not fit; the message states the bytes needed.
    """

    DTYPES: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "int8")
    #: Whether it knows what passes cost, so that it can choose how far to look ahead.
    MEASURES_PASSES: ClassVar[bool] = True
    #: Whether `decode` has classifier-free guidance.
    GUIDES: ClassVar[bool] = True

    @staticmethod
    def refusal(gpt: Transformer) -> str | None:
        """Why the engine cannot run this GPT, or None when it can."""
        module, reason = backends.native()
        if module is None:
            return reason
        device = next(gpt.parameters()).device.type
        if device != "cpu":
            return f"it runs on the CPU, and the transformer is on {device}"
        kind = kind_of(gpt.config)
        if kind.gated and (kind.hidden or 4 * gpt.config.n_embd) % _PANEL:
            return f"the width of a gated MLP must be a multiple of {_PANEL}, and it is {kind.hidden}"
        if kind.rotary and gpt.config.n_embd // gpt.config.n_head % _PAIR:
            return "heads must have an even width for rotary positions"
        return None

    def __init__(
        self, gpt: Transformer, dtype: str = "float32", threads: int | None = None, drafts: bool = False
    ) -> None:
        module, _ = backends.native()
        reason = self.refusal(gpt)
        if module is None or reason is not None:
            raise SettingError(
                f"engine: got a transformer that the CPU engine cannot run ({reason}), expected one that it can"
            )
        self.threads = threads
        self.dtype = dtype
        self.vocab_size, self._block_size = gpt.config.vocab_size, gpt.config.block_size
        # Conversion may make new tensors: they must live until the engine has packed them.
        weights = {
            name: value.to(torch.float32).contiguous().resolve_neg() for name, value in checked_parameters(gpt).items()
        }
        kind = kind_of(gpt.config)
        geometry = {name: getattr(gpt.config, name, 0) for name in _GEOMETRY}
        geometry |= {name: int(getattr(kind, name)) for name in _KIND}
        self._native = module.GPTEngine(
            {name: check.array(name, value, torch.float32) for name, value in weights.items()},
            geometry,
            dtype,
            self._thread_count(),
            backends.isa(),
            draft="int8" if drafts else "",
        )
        self._n_unmasked, self._extra_tokens = geometry["n_unmasked"], kind.extra_tokens
        self._room = self._room_of(0, 0)

    def _thread_count(self) -> int:
        return min(torch.get_num_threads() if self.threads is None else self.threads, _MOST_THREADS)

    def _room_of(self, slots: int, capacity: int) -> Room:
        return Room(self.vocab_size, slots, capacity, self._native.length, self._n_unmasked, self._extra_tokens)

    def reserve(self, slots: int, length: int) -> None:
        """Replaces the cache with one of ``slots`` empty slots of ``length`` positions.

        Raises ValueError for sizes out of range. Raises MemoryError, with the bytes needed, and keeps the old cache if
        the new one does not fit.
        """
        check_reserve(slots, length, self._block_size)
        self._native.reserve(slots, length)
        self._room = self._room_of(slots, length)

    def length(self, slot: int) -> int:
        """The number of valid positions of the slot."""
        self._room.check_slot("slot", slot)
        return self._native.length(slot)

    def truncate(self, slot: int, length: int) -> None:
        """Drops the slot's positions from ``length`` on."""
        self._room.check_slot("slot", slot)
        self._room.check_length(slot, length)
        self._native.truncate(slot, length)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Copies the first ``length`` (default: all) positions of slot ``source`` into slot ``target``."""
        self._room.check_slot("source", source)
        self._room.check_slot("target", target)
        length = self.length(source) if length is None else length
        self._room.check_length(source, length)
        self._native.copy(source, target, length)

    def step(self, items: Items, logits: Asked = "last") -> Tensor:
        """Feeds tokens to slots; the weights are read once for all of them.

        Args:
            items: (slot, start, tokens) each, for distinct slots; the tokens go to positions ``start`` onwards.
                ``start`` is at most the slot's length, and its later positions are dropped. The positions of an
                unmasked prefix (``n_unmasked``) attend to each other, so they must come in one piece, from 0 on.
            logits: "last" gives float32 (items, vocab_size), "all" (all tokens, vocab_size), "none" (0, vocab_size); a
                number for each item those of its last tokens.

        Raises:
            ValueError: a slot, start, position or token out of range, which the message names.
        """
        return self.feed(*spans_of(items), logits)

    def feed(self, tokens: Tensor, spans: Sequence[Span], logits: Asked = "last") -> Tensor:
        """As `step`; ``tokens`` is int64 (T,), those of all spans one after the other."""
        self._room.check_step(tokens, spans, logits)
        self._room.check_tokens(tokens)
        asked = asked_of(spans, logits)
        out = torch.empty(sum(asked), self.vocab_size, dtype=torch.float32, device="cpu")
        parts = tokens.split([span.count for span in spans])
        items = [(span.slot, span.start, part.tolist(), n) for span, part, n in zip(spans, parts, asked, strict=True)]
        self._native.set_threads(self._thread_count())
        self._native.step(items, check.array("out", out, torch.float32))
        return out

    def decode(self, request: DecodeRequest, progress: Callable[[int], None] | None = None, every: int = 1) -> None:
        """Decodes the requested tokens and writes them into ``request.sequences``.

        Args:
            request: its sequences are on the CPU.
            progress: called with the number of steps done, whenever ``every`` divides it.
            every: at least 1.

        Raises:
            ValueError: an invalid argument, which the message names.
            UserError: a row of logits has NaN, or only -inf.
            KeyboardInterrupt: within 100 ms of Ctrl-C; the slots' lengths then count the valid positions.
        """
        check_range("every", every, 1)
        request.check_fits(self._room, torch.device("cpu"))
        self._native.set_threads(self._thread_count())
        found = self._native.decode(
            request.slots,
            check.array("sequences", request.sequences, torch.int64),
            request.sequences.shape[1],
            request.fed,
            request.steps,
            request.wanted.flatten().tolist(),
            request.rows,
            request.columns,
            request.images,
            **request.options(self.vocab_size),
            lookahead=0 if request.lookahead is None else request.lookahead,
            **_guidance(request),
            progress=progress,
            every=every,
        )
        check_chosen(nan=bool(found & 1), nothing=bool(found))

    def pass_seconds(self, rows: Sequence[int]) -> list[float]:
        """Seconds of a pass over each number of tokens in the middle of the cache; before `reserve`, without attention.

        Measured when it is first needed, and anew when the capacity more than doubled or halved, and interpolated;
        `decode` chooses by it how far to look ahead.
        """
        self._native.set_threads(self._thread_count())
        found = self._native.pass_seconds(list(rows))
        return [found[count] for count in rows]

    def info(self) -> dict[str, int]:
        """Sizes, threads, and what `decode` did so far.

        weight_bytes (read for every pass), cache_bytes, slots, capacity (positions of a slot), threads; passes, rows
        (of logits computed), tokens (chosen); draft_bytes (weights and cache of the copy that guesses).
        """
        return self._native.info()

    def close(self) -> None:
        """Frees the memory; every later call raises ValueError."""
        self._native.close()


def _guidance(request: DecodeRequest) -> dict[str, Any]:
    """The second sequences as keyword arguments of the extension, which takes a scale for every position."""
    second = request.second
    if second is None:
        return {}
    scales = [1.0] * request.sequences.shape[1]
    for step, scale in zip(request.steps, second.scales, strict=True):
        scales[step] = scale
    return {"null_slots": list(second.slots), "null_token": second.null, "prefix": second.prefix, "scales": scales}
