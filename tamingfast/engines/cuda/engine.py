"""The engine as its callers see it: slots, passes over fed tokens, decoding."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.engines.cuda.rows import Group, Rows, passes
from tamingfast.engines.cuda.step import FEW, VECTOR, Loop, Plan, lasting_tensors
from tamingfast.engines.cuda.weights import Norm, Weights
from tamingfast.engines.request import Span, check_range
from tamingfast.ops import backends
from tamingfast.ops.choice import Choice

DTYPES = ("float32", "bfloat16", "float16")
WIDEST_HEAD = 256
_TOKENS_PER_PASS = 8192  # enough to fill any machine
_MOST_STEPS_AHEAD = 64  # that are queued before the host looks for errors and for Ctrl-C
_SECONDS_AHEAD = 0.05  # that these may take
_SHORT_GAP = 4  # known tokens between two steps that are cheaper to step over than to feed in a pass
_POSITIONS_PER_BLOCK = 64  # of the attention, at least; kLeast in csrc/cuda/attention.cu
_BLOCKS_AT_ONCE = 4  # of the attention, that a multiprocessor holds; kResident there is the most


def refusal(gpt: nn.Module) -> str | None:
    """Why the engine cannot run this GPT, whose parameters are on a CUDA device; None when it can."""
    state = backends.cuda()
    if not state.available:
        return state.reason
    capability = torch.cuda.get_device_capability(gpt.pos_emb.device)
    if capability < backends.OLDEST_CUDA:
        return f"its kernels need compute capability {_dotted(backends.OLDEST_CUDA)}, and {_dotted(capability)} is here"
    head = gpt.config.n_embd // gpt.config.n_head
    return (
        f"its kernels are for heads up to {WIDEST_HEAD} wide, and these are {head} wide" * (head > WIDEST_HEAD) or None
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


class CudaEngine:
    """A copy of a GPT's weights on its device and a cache of keys and values, in slots: one sequence each.

    Weights, activations and cache have the engine's type; residuals, sums, norms and softmax are float32. One thread
    at a time works; others wait. Work is queued on the current stream, after all earlier work of the engine.

    Args:
        gpt: a `GPT` of any floating type; its weights are copied.
        dtype: "float32", "bfloat16" or "float16".
        kernels: the module that holds the kernels' functions; default: the extension's.

    Raises:
        ValueError: an unknown dtype.
        RuntimeError: the engine cannot run here, with the reason; or a kernel could not be launched, with its name.
        MemoryError: the weights do not fit; the message tells the bytes.
    """

    def __init__(self, gpt: nn.Module, dtype: str = "float32", kernels: ModuleType | None = None) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
        if kernels is None:
            if (reason := refusal(gpt)) is not None:
                raise RuntimeError(f"the CUDA engine cannot run this transformer: {reason}")
            kernels = backends.native()[0].cuda
        config = gpt.config
        self.kernels, self.dtype, self.number = kernels, dtype, getattr(torch, dtype)
        self.device = gpt.pos_emb.device
        self.vocab_size, self.block_size, self.width = config.vocab_size, config.block_size, config.n_embd
        self.heads, self.head = config.n_head, config.n_embd // config.n_head
        self.stride = math.ceil(self.head / VECTOR) * VECTOR  # of a cached position
        # A prefix of one position is the plain causal mask.
        self.n_unmasked = config.n_unmasked if getattr(config, "n_unmasked", 0) > 1 else 0
        size = sum(value.numel() for value in gpt.parameters()) * self.number.itemsize
        with self._memory_for("weights", size), lasting_tensors():
            self.weights = Weights(gpt, self.number)
        self._lock, self._owner, self._closed = threading.Lock(), None, False
        self._done: torch.cuda.Event | None = None  # of all that was queued so far
        self._seen_by: set[torch.cuda.Stream] = set()
        if self.device.type == "cuda":
            self._done = self._stream().record_event()
            self._seen_by.add(self._stream())
        self._lengths: list[int] = []
        self._loops: dict[int, Loop] = {}
        self.cache = torch.empty(0)
        self.capacity = 0

    # --- slots ----------------------------------------------------------------------------------------

    def reserve(self, slots: int, length: int) -> None:
        """Makes the cache anew: `slots` empty sequences of at most `length` positions. MemoryError tells the bytes."""
        check_range("slots", slots, 1, 1 << 24)
        check_range("length", length, 1, self.block_size)
        with self._turn():
            shape = (len(self.weights.layers), 2, slots, self.heads, length, self.stride)
            with self._memory_for("cache", math.prod(shape) * self.number.itemsize), lasting_tensors():
                # Zeros behind the width of a head, where it is padded.
                cache = torch.zeros(shape, dtype=self.number, device=self.device)
            self.cache, self.capacity, self._lengths = cache, length, [0] * slots
            self._loops.clear()

    @property
    def slots(self) -> int:
        return len(self._lengths)

    def length(self, slot: int) -> int:
        """How many positions of the slot are valid."""
        with self._alone():
            check_range("slot", slot, 0, self.slots - 1)
            return self._lengths[slot]

    def truncate(self, slot: int, length: int) -> None:
        """Forgets the slot's positions from `length` on."""
        with self._alone():
            check_range("slot", slot, 0, self.slots - 1)
            check_range("length", length, 0, self._lengths[slot])
            self._lengths[slot] = length

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Makes slot `target` hold the first `length` (default: all) positions of slot `source`."""
        with self._turn():
            check_range("source", source, 0, self.slots - 1)
            check_range("target", target, 0, self.slots - 1)
            length = self._lengths[source] if length is None else length
            check_range("length", length, 0, self._lengths[source])
            if source != target:
                self.cache[:, :, target, :, :length] = self.cache[:, :, source, :, :length]
            self._lengths[target] = length

    def info(self) -> dict[str, int]:
        """weight_bytes (read for every token), cache_bytes, slots, capacity (positions of a slot)."""
        with self._alone():
            return {
                "weight_bytes": self.weights.matrix_bytes(), "cache_bytes": self.cache.nbytes, "slots": self.slots,
                "capacity": self.capacity,
            }  # fmt: skip

    def close(self) -> None:
        """Frees the memory; every later call raises ValueError."""
        with self._turn():
            self._wait()
            self._closed = True
            self._loops.clear()
            self.weights, self.cache = None, torch.empty(0)

    # --- passes ---------------------------------------------------------------------------------------

    def step(self, items: Iterable[tuple[int, int, Sequence[int]]], logits: str = "last") -> Tensor:
        """Feeds tokens to slots; arguments, result and errors are those of `tamingfast.engines.cpu.GPTEngine.step`.

        The result is on the engine's device.
        """
        items = [(slot, start, list(tokens)) for slot, start, tokens in items]
        flat = [token for _, _, tokens in items for token in tokens]
        for token in flat:
            check_range("token", token, 0, self.vocab_size - 1)
        spans = [Span(slot, start, len(tokens)) for slot, start, tokens in items]
        return self._fed(torch.tensor(flat, dtype=torch.int64), spans, logits)

    def feed(self, tokens: Tensor, spans: Iterable[Span], logits: str = "last") -> Tensor:
        """As `step`, for tokens that are on the device already.

        Args:
            tokens: int64 (T,), of all spans in turn. They must lie in the vocabulary: the host does not look at them,
                as it would have to wait.
            spans: of distinct slots.
            logits: as in `step`.
        """
        return self._fed(tokens, list(spans), logits)

    def _fed(self, tokens: Tensor, spans: list[Span], logits: str) -> Tensor:
        if logits not in ("none", "last", "all"):
            raise ValueError(f"logits: got {logits!r}, expected one of none, last, all")
        with self._turn():
            self._check_spans(spans)
            tokens, found, at = tokens.to(self.device), [], 0
            with self._memory_for("activations", Loop.bytes(self, min(len(tokens), _TOKENS_PER_PASS))):
                for part in passes(spans, _TOKENS_PER_PASS):
                    count = sum(span.count for span in part)
                    found.append(self._pass(tokens[at : at + count], part, logits))
                    at += count
                return torch.cat(found) if found else self._pass(tokens, [], "none")

    def _check_spans(self, spans: list[Span]) -> None:
        seen: set[int] = set()
        for span in spans:
            check_range("slot", span.slot, 0, self.slots - 1)
            if span.slot in seen:
                raise ValueError(f"slot: got {span.slot}, expected every slot at most once in a step")
            seen.add(span.slot)
            held = self._lengths[span.slot]
            if span.count < 1:
                raise ValueError(f"tokens of slot {span.slot}: got {span.count}, expected at least one")
            if not 0 <= span.start <= held:
                raise ValueError(f"start: got {span.start}, expected 0 to {held}, the length of slot {span.slot}")
            if span.start + span.count > self.capacity:
                raise ValueError(
                    f"position: got {span.start + span.count - 1}, expected at most {self.capacity - 1}, "
                    "the last that the cache holds"
                )
            if 0 < span.start < self.n_unmasked:
                raise ValueError(
                    f"start: got {span.start}, expected 0 or from {self.n_unmasked} on: the unmasked prefix sees "
                    "itself whole, so it is fed in one piece"
                )

    def _pass(self, tokens: Tensor, spans: list[Span], logits: str) -> Tensor:
        """Feeds tokens (T,) of the spans; float32 logits of the rows that are asked for."""
        rows = Rows(spans, self.n_unmasked, 2 * self.heads * self.stride * self.number.itemsize, self.device)
        for span in spans:  # what is written over is no longer valid, even if this is interrupted
            self._lengths[span.slot] = min(self._lengths[span.slot], span.start)
        # Of all layers: a launch leaves its room as it found it.
        rooms = [
            {} if group.alike else self._split_room(group.stop - group.first, rows.longest) for group in rows.groups
        ]
        x = self.weights.tok_emb[tokens] + self.weights.pos_emb[rows.position.long()]
        for layer, (keys, values) in zip(self.weights.layers, self.cache, strict=True):
            qkv = F.linear(self._normed(x, layer.ln1), layer.qkv.weight, layer.qkv.own_bias)
            y = F.linear(self._attended(qkv, rows, rooms, keys, values), layer.proj.weight)
            inner = F.linear(self._normed(x, layer.ln2, y, layer.proj.bias), layer.up.weight)
            self._launch("bias_gelu", inner, bias=layer.up.bias, x=inner, ldx=inner.stride(0))
            x += F.linear(inner, layer.down.weight, layer.down.own_bias)
        for span in spans:
            self._lengths[span.slot] = span.start + span.count
        asked = {"none": x[:0], "last": x[rows.ends], "all": x}[logits]
        return F.linear(self._normed(asked, self.weights.ln_f).float(), self.weights.wide_head)

    def _normed(self, x: Tensor, norm: Norm, y: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The norm of x, to which y + bias is added before."""
        out = torch.empty(x.shape, dtype=self.number, device=self.device)
        self._launch(
            "add_norm", x, x=x, ldx=x.stride(0), y=y, ldy=1 if y is None else y.stride(0), bias=bias, gain=norm.gain,
            shift=norm.shift, epsilon=norm.epsilon, out=out, ldo=out.stride(0),
        )  # fmt: skip
        return out

    def _attended(self, qkv: Tensor, rows: Rows, rooms: list[dict[str, Any]], keys: Tensor, values: Tensor) -> Tensor:
        out = torch.empty(len(qkv), self.width, dtype=self.number, device=self.device)
        cached = self._cached(keys, values) | dict(slot=rows.slot, position=rows.position)
        self._launch("append", qkv, width=self.head, qkv=qkv, ldq=qkv.stride(0), **cached)
        for group, room in zip(rows.groups, rooms, strict=True):
            some = slice(group.first, group.stop)
            if group.alike:
                out[some] = self._in_tiles(qkv[some], group, rows.slot[some], keys, values)
                continue
            part = cached | {name: cached[name][some] for name in ("slot", "position")}
            self._launch(
                "attention", qkv[some], width=self.head, qkv=qkv[some], ldq=qkv.stride(0), last=rows.last[some],
                append=False, out=out[some], ldo=out.stride(0), **part, **room,
            )  # fmt: skip
        return out

    def _in_tiles(self, qkv: Tensor, group: Group, slot: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention (R, W) of the group's rows, whose keys and values the cache holds already."""
        q, k, v = qkv.view(group.alike, -1, 3, self.heads, self.head).permute(2, 0, 3, 1, 4).unbind(0)
        if group.start:
            held = (slot[:: group.count].long(), slice(None), slice(group.start + group.count), slice(self.head))
            k, v = keys[held], values[held]
            q = F.pad(q, (0, 0, group.start, 0))  # as many queries as keys
        n_unmasked = 0 if group.start else self.n_unmasked  # what comes behind sees no later position
        seen = ops.causal_attention(q, k, v, n_unmasked=n_unmasked)[:, :, group.start :]
        return seen.transpose(1, 2).reshape(len(qkv), -1)

    def _cached(self, keys: Tensor, values: Tensor) -> dict[str, Any]:
        return dict(heads=self.heads, stride=self.stride, capacity=self.capacity, keys=keys, values=values)

    def _splits(self, rows: int, longest: int) -> int:
        """Blocks that share the positions of a row and head.

        One for each `_POSITIONS_PER_BLOCK` where rows are few, so that their sums depend neither on how many they are
        nor on the device; else as many as fill the device.
        """
        most = math.ceil(longest / _POSITIONS_PER_BLOCK)
        if rows <= FEW:
            return most
        return max(1, min(_BLOCKS_AT_ONCE * backends.multiprocessors(self.device) // (rows * self.heads), most))

    def _split_room(self, rows: int, longest: int) -> dict[str, Any]:
        """The arguments of split attention: the splits, their parts of the result, and how many have arrived."""
        splits, partial, arrived = self._splits(rows, longest), None, None
        if splits > 1:
            partial = torch.empty(rows, self.heads, splits, self.stride + 2, device=self.device)
            arrived = torch.zeros(rows, self.heads, dtype=torch.int32, device=self.device)
        return dict(splits=splits, partial=partial, arrived=arrived)

    # --- decoding -------------------------------------------------------------------------------------

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
        before: int = 0,
    ) -> None:
        """Decodes tokens of several sequences side by side and writes them into `sequences`.

        Arguments and errors are those of `GPTEngine.decode`; `sequences` is on the engine's device.
        The host waits only when progress is to be told, every 50 ms or 64 steps, and at the end. All slots are fed
        alike, also where a token is not wanted.
        """
        steps, slots = list(map(int, steps)), list(slots)
        wanted = torch.ones(len(slots), len(steps)) if wanted is None else wanted
        plan = Plan(
            slots, steps, wanted.bool(), [0] * len(steps) if rows is None else list(rows),
            steps if columns is None else list(columns), list(range(len(slots))) if images is None else list(images),
        )  # fmt: skip
        choices = self.vocab_size if choices is None else choices
        Choice(temperature=temperature, top_k=top_k or None, top_p=top_p, seed=seed)
        check_range("choices", choices, 1, self.vocab_size)
        check_range("every", every, 1, None)
        with self._turn():
            self._check_plan(plan, sequences, fed)
            if not slots or not steps:
                return
            options = self.kernels.options_bytes(
                greedy, temperature, top_k or 0, 1.0 if top_p is None else top_p, seed, choices
            )
            self._hold(plan, fed)  # what follows is written over, even if this is interrupted
            with self._memory_for("activations", Loop.bytes(self, len(slots))):
                loop = self._loop(len(slots))
                loop.begin(plan, sequences, options)
            done, ahead, since = 0, 1, time.perf_counter()  # steps whose tokens the caller has; until the next look
            try:
                for i, _ in enumerate(self._steps(loop, plan, fed), 1):
                    tell = progress is not None and (before + i) % every == 0
                    if tell or i - done >= ahead or i == len(steps):
                        try:
                            loop.collect(sequences, steps[i - 1] + 1)
                        except ValueError:
                            self._hold(plan, fed)  # a stand-in for the token that could not be chosen was fed
                            raise
                        now = time.perf_counter()
                        ahead = steps_ahead((now - since) / (i - done))
                        done, since = i, now
                    if tell:
                        progress(before + i)
                        since = time.perf_counter()
            finally:
                self._wait()  # what is queued reads and writes the slots

    def _loop(self, batch: int) -> Loop:
        if batch not in self._loops:
            with lasting_tensors():
                self._loops[batch] = Loop(self, batch)
        return self._loops[batch]

    def _steps(self, loop: Loop, plan: Plan, fed: int) -> Iterator[None]:
        """Queues one step after the other; the slots hold `fed` positions of the sequences."""
        for length in plan.steps:
            with self._memory_for("activations", Loop.bytes(self, len(plan.slots))):
                self._step(loop, plan, fed, length)
            self._hold(plan, length)
            fed = length
            yield

    def _step(self, loop: Loop, plan: Plan, fed: int, length: int) -> None:
        """Chooses the token after the first `length` of each sequence."""
        start = min(fed, length - 1)  # a kept prefix may hold all that is needed but the logits
        if start < self.n_unmasked:
            start = 0
        if length <= self.n_unmasked:  # the last token, too, is seen by those before it
            loop.place(length - 1)
            loop.choose(self._feed_columns(loop, plan, 0, length, "last"))
        else:
            if loop.position is not None and length - 1 - start <= _SHORT_GAP and loop.position == start:
                for position in range(start, length - 1):
                    loop.advance()
                    self._hold(plan, position + 1)
            elif start < length - 1:
                self._feed_columns(loop, plan, start, length - 1, "none")
            if loop.position != length - 1:
                loop.place(length - 1)
            loop.advance()

    def _hold(self, plan: Plan, length: int) -> None:
        for slot in plan.slots:
            self._lengths[slot] = length

    def _feed_columns(self, loop: Loop, plan: Plan, start: int, stop: int, logits: str) -> Tensor:
        """Feeds the loop's sequences from `start` to `stop`, a number of them at a time."""
        at_once, found = max(1, _TOKENS_PER_PASS // (stop - start)), []
        for first in range(0, len(plan.slots), at_once):
            spans = [Span(slot, start, stop - start) for slot in plan.slots[first : first + at_once]]
            tokens = loop.sequence[first : first + at_once, start:stop].flatten()
            found.append(self._pass(tokens, spans, logits))
        return torch.cat(found)

    def _check_plan(self, plan: Plan, sequences: Tensor, fed: int) -> None:
        if sequences.dtype != torch.int64 or sequences.ndim != 2 or not sequences.is_contiguous():
            raise ValueError(
                f"sequences: got {sequences.dtype} {tuple(sequences.shape)}, expected contiguous int64 (B, L)"
            )
        if sequences.device != self.device:
            raise ValueError(f"sequences: got a tensor on {sequences.device}, expected one on {self.device}")
        if len(sequences) != len(plan.slots):
            raise ValueError(f"slots: got {len(plan.slots)}, expected one for each of {len(sequences)} sequences")
        for slot in plan.slots:
            check_range("slot", slot, 0, self.slots - 1)
            if fed > self._lengths[slot]:
                raise ValueError(f"fed: got {fed}, expected at most the length of every slot")
        if len(set(plan.slots)) != len(plan.slots):
            raise ValueError(f"slot: got {plan.slots}, expected every slot at most once")
        check_range("fed", fed, 0, None)
        least = 1
        for step in plan.steps:
            check_range("steps", step, least, sequences.shape[1] - 1)
            least = step + 1
            if step > self.capacity:
                raise ValueError(f"steps: got {step}, expected at most {self.capacity}, one more than the cache holds")
        plan.check()
        if plan.steps:
            self._check_tokens(plan, sequences)

    def _check_tokens(self, plan: Plan, sequences: Tensor) -> None:
        """Those that are fed as they are given. The one time that the host waits before the end."""
        given = torch.ones(sequences.shape[0], plan.steps[-1] + 1, dtype=torch.bool)
        given[:, plan.steps] = ~plan.wanted.cpu().reshape(len(given), -1)
        tokens = sequences[:, : given.shape[1]].masked_fill(~given.to(self.device), 0)
        low, high = torch.stack(tokens.aminmax()).tolist()
        for token in (low, high):
            check_range("token", token, 0, self.vocab_size - 1)

    # --- the device -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Makes other threads wait."""
        if self._owner == threading.get_ident():
            raise RuntimeError("the engine is working: a callback cannot use it")
        with self._lock:
            if self._closed:
                raise ValueError("the engine is closed")
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """As `_alone`; and work that is queued follows all that was queued before, on whichever stream."""
        with self._alone(), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self._done is None:
                yield
                return
            with torch.cuda.device(self.device):
                stream = self._stream()
                stream.wait_event(self._done)
                self._seen_by.add(stream)
                for tensor in self._tensors() if len(self._seen_by) > 1 else ():
                    tensor.record_stream(stream)  # its memory is not given away while this stream uses it
                try:
                    yield
                finally:
                    self._done.record(stream)

    def _tensors(self) -> Iterator[Tensor]:
        yield self.cache
        yield from self.weights.tensors()
        for loop in self._loops.values():
            yield from (value for value in (vars(loop) | loop.room).values() if isinstance(value, Tensor))

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def _wait(self) -> None:
        if self._done is not None:
            self._stream().synchronize()

    def _launch(self, kernel: str, sized: Tensor, dtype: str | None = None, **arguments: Any) -> None:
        """Launches a kernel for the rows of `sized`; tensors become addresses, None the null pointer."""
        defaults = dict(rows=sized.shape[0], width=sized.shape[1], dtype=dtype or self.dtype)
        values = {
            name: 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in (defaults | arguments).items()
        }
        cuda = self._done is not None
        if sized.shape[0] > 0:
            getattr(self.kernels, kernel)(
                device=self.device.index or 0, stream=self._stream().cuda_stream if cuda else 0, **values
            )

    @contextlib.contextmanager
    def _memory_for(self, what: str, size: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.OutOfMemoryError is one, the CPU's is nothing else
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            message = f"{what}: {size} bytes are needed"
            if self.device.type == "cuda":
                message += f", but only {torch.cuda.mem_get_info(self.device)[0]} bytes are free on {self.device}"
            raise MemoryError(message) from error


def steps_ahead(seconds: float) -> int:
    """How many steps of so many seconds are queued before the host looks again."""
    return max(1, min(_MOST_STEPS_AHEAD, int(_SECONDS_AHEAD / max(seconds, 1e-9))))
