"""The step of fixed shape that a CUDA graph replays."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tamingfast.engines.cuda.weights import Linear, Norm
from tamingfast.engines.request import check_range

if TYPE_CHECKING:
    from tamingfast.engines.cuda.engine import CudaEngine

FEW = 8  # sequences for which reading the weights is all that counts
VECTOR = 8  # elements that a kernel reads at a time


@dataclass(frozen=True)
class Plan:
    """What a call of `decode` asks for; see there."""

    slots: list[int]
    steps: list[int]
    wanted: Tensor
    rows: list[int]
    columns: list[int]
    images: list[int]

    def check(self) -> None:
        batch, count = len(self.slots), len(self.steps)
        for name, got, expected in (
            ("wanted", self.wanted.numel(), batch * count), ("rows", len(self.rows), count),
            ("columns", len(self.columns), count), ("images", len(self.images), batch),
        ):  # fmt: skip
            if got != expected:
                raise ValueError(f"{name}: got {got} values, expected {expected}")
        for name, values in (("rows", self.rows), ("columns", self.columns), ("images", self.images)):
            for value in values:
                check_range(name, value, 0, (1 << 32) - 1)


class Loop:
    """One step of a batch in memory that stays where it is, so that a graph of it can be replayed."""

    def __init__(self, engine: CudaEngine, batch: int) -> None:
        self.engine = weakref.proxy(engine)  # which holds this loop: a cycle would keep its memory for long
        self.batch, self.length = batch, engine.capacity + 1
        self.streaming = batch <= FEW and engine.width % VECTOR == 0  # by kernels that read vectors
        width, number, device = engine.width, engine.number, engine.device
        empty = functools.partial(torch.empty, device=device)
        self.slot, self.at = torch.zeros(2, batch, dtype=torch.int32, device=device)
        self.sequence = torch.zeros(batch, self.length, dtype=torch.int64, device=device)
        self.wanted = torch.zeros(batch, self.length, dtype=torch.bool, device=device)
        self.images = torch.zeros(batch, dtype=torch.int64, device=device)
        self.places = torch.zeros(2, self.length, dtype=torch.int64, device=device)
        self.options = torch.zeros(
            len(engine.kernels.options_bytes(True, 1, 0, 1, 0, 1)), dtype=torch.uint8, device=device
        )
        self.errors = torch.zeros(1, dtype=torch.int32, device=device)
        self.x = empty(batch, width)
        self.normed, self.y, self.joined = (empty(batch, width, dtype=number) for _ in range(3))
        self.qkv, self.inner = empty(batch, 3 * width, dtype=number), empty(batch, 4 * width, dtype=number)
        self.logits, self.widened = empty(batch, engine.vocab_size), empty(batch, width)
        self.room = engine._split_room(batch, engine.capacity)
        self.position: int | None = None  # of the token whose embedding is in x, in all sequences
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    @staticmethod
    def bytes(engine: CudaEngine, batch: int) -> int:
        """About what it takes."""
        activations = (8 + 10 * engine.number.itemsize) * engine.width + 4 * engine.vocab_size
        return batch * (activations + 9 * (engine.capacity + 1))

    def begin(self, plan: Plan, sequences: Tensor, options: bytes) -> None:
        """Takes over what a call of `decode` asks for."""
        device = self.engine.device
        self.slot.copy_(torch.tensor(plan.slots, dtype=torch.int32))
        known = min(sequences.shape[1], self.length)
        self.sequence[:, :known] = sequences[:, :known]
        steps = torch.tensor(plan.steps, device=device)
        self.wanted.zero_()
        self.wanted[:, steps] = plan.wanted.to(device).reshape(self.batch, -1)
        self.places[:, steps] = torch.tensor([plan.rows, plan.columns], device=device)
        self.images.copy_(torch.tensor(plan.images))
        self.options.copy_(torch.frombuffer(bytearray(options), dtype=torch.uint8))
        self.errors.zero_()
        self.position = None

    def place(self, position: int) -> None:
        """Goes to the token at that position of all sequences."""
        self.at.fill_(position)
        self.x.copy_(self.engine.weights.tok_emb[self.sequence[:, position]] + self.engine.weights.pos_emb[position])
        self.position = position

    def advance(self) -> None:
        """Feeds the token where it stands, chooses the next one and goes to it."""
        if self.engine.device.type != "cuda":
            self._queue()
        elif self.graph is not None:
            self.graph.replay()
        else:
            self._first_times()
        self.position += 1

    def _first_times(self) -> None:
        """The first step as it is, since libraries set themselves up in it; the second is captured and replayed.

        Both on one stream, as torch keeps the workspace of its matrix products by stream: what the capture uses is
        there by then, and does not go into the graph's own memory.
        """
        current, stream = torch.cuda.current_stream(self.engine.device), _capture_stream(self.engine.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                self._queue() if not self.warm else self._capture(stream)
            self.warm = True
        finally:
            current.wait_stream(stream)
        if self.graph is not None:
            self.graph.replay()

    def _capture(self, stream: torch.cuda.Stream) -> None:
        graph = torch.cuda.CUDAGraph()
        # torch fills tensors of its own whenever it replays a graph, in whatever mode that is; and other threads may
        # allocate meanwhile.
        with lasting_tensors(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._queue()
        self.graph = graph

    def _queue(self) -> None:
        logits = self._streamed() if self.streaming else self._multiplied()
        self._choose(logits)

    def _streamed(self) -> Tensor:
        """The logits, by kernels that read every weight once."""
        engine = self.engine
        for layer, (keys, values) in zip(engine.weights.layers, engine.cache, strict=True):
            self._linear(layer.qkv, self.x, "store", self.qkv, layer.ln1)
            self._attend(keys, values)
            self._linear(layer.proj, self.joined, "add", self.x)
            self._linear(layer.up, self.x, "gelu", self.inner, layer.ln2)
            self._linear(layer.down, self.inner, "add", self.x)
        self._linear(engine.weights.head, self.x, "store_float", self.logits, engine.weights.ln_f)
        return self.logits

    def _linear(self, linear: Linear, x: Tensor, epilogue: str, out: Tensor, norm: Norm | None = None) -> None:
        self.engine._launch(
            "linear", x, inner=x.shape[1], columns=len(linear.weight), x=x, ldx=x.stride(0),
            gain=norm and norm.gain, shift=norm and norm.shift, epsilon=norm.epsilon if norm else 0.0,
            weight=linear.weight, bias=linear.bias, epilogue=epilogue, out=out, ldo=out.stride(0),
        )  # fmt: skip

    def _attend(self, keys: Tensor, values: Tensor) -> None:
        engine = self.engine
        engine._launch(
            "attention", self.qkv, width=engine.head, qkv=self.qkv, ldq=self.qkv.stride(0), slot=self.slot,
            position=self.at, last=self.at, append=True, out=self.joined, ldo=engine.width,
            **self.room, **engine._cached(keys, values),
        )  # fmt: skip

    def _multiplied(self) -> Tensor:
        """The logits, by torch's matrix products."""
        engine = self.engine
        y = bias = None
        for layer, (keys, values) in zip(engine.weights.layers, engine.cache, strict=True):
            self._norm(layer.ln1, y, bias)
            torch.addmm(layer.qkv.own_bias, self.normed, layer.qkv.weight.t(), out=self.qkv)
            self._attend(keys, values)
            torch.mm(self.joined, layer.proj.weight.t(), out=self.y)
            self._norm(layer.ln2, self.y, layer.proj.bias)
            torch.mm(self.normed, layer.up.weight.t(), out=self.inner)
            engine._launch("bias_gelu", self.inner, bias=layer.up.bias, x=self.inner, ldx=self.inner.stride(0))
            y, bias = torch.mm(self.inner, layer.down.weight.t(), out=self.y), layer.down.bias
        self._norm(engine.weights.ln_f, y, bias)
        self.widened.copy_(self.normed)
        return torch.mm(self.widened, engine.weights.wide_head.t(), out=self.logits)

    def _norm(self, norm: Norm, y: Tensor | None, bias: Tensor | None) -> None:
        self.engine._launch(
            "add_norm", self.x, x=self.x, ldx=self.x.stride(0), y=y, ldy=self.y.stride(0), bias=bias, gain=norm.gain,
            shift=norm.shift, epsilon=norm.epsilon, out=self.normed, ldo=self.normed.stride(0),
        )  # fmt: skip

    def choose(self, logits: Tensor) -> None:
        """Chooses the token after the one where it stands from logits (B, V) and goes to it."""
        self._choose(logits)
        self.position += 1

    def _choose(self, logits: Tensor) -> None:
        engine = self.engine
        engine._launch(
            "choose", self.x, dtype=str(logits.dtype).removeprefix("torch."), vocab=engine.vocab_size, logits=logits,
            ldl=logits.stride(0), options=self.options, images=self.images, places=self.places, wanted=self.wanted,
            sequence=self.sequence, length=self.length, position=self.at, tok_emb=engine.weights.tok_emb,
            pos_emb=engine.weights.pos_emb, positions=engine.block_size, x=self.x, ldx=self.x.stride(0),
            errors=self.errors,
        )  # fmt: skip

    def collect(self, sequences: Tensor, length: int) -> None:
        """Waits, and writes the first `length` tokens into `sequences`; ValueError where none could be chosen."""
        errors = int(self.errors)
        if errors:
            found = "NaN" if errors & 1 else "only -inf"
            raise ValueError(f"logits hold {found} in some row, so no token can be chosen: check the weights")
        sequences[:, :length] = self.sequence[:, :length]


_streams = threading.local()


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The calling thread's, always the same: torch keeps a workspace for each for good."""
    kept = vars(_streams)
    if device not in kept:
        kept[device] = torch.cuda.Stream(device, priority=-1)  # from a pool of torch's that few others draw from
    return kept[device]


@contextlib.contextmanager
def lasting_tensors() -> Iterator[None]:
    """Tensors made inside may be written later whether or not `torch.inference_mode` is on by then."""
    with torch.inference_mode(False), torch.no_grad():
        yield
