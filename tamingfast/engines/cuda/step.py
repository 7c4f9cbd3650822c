"""The step of fixed shape: one token of each sequence through all layers, the choice of the next, its embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tamingfast.engines.cuda.cache import Cache
from tamingfast.engines.cuda.device import FEW, VECTOR, Device, Replayed, lasting_tensors
from tamingfast.engines.cuda.weights import Geometry, Norm, Weights
from tamingfast.engines.networks import LayerCache
from tamingfast.engines.request import DecodeRequest
from tamingfast.ops.choice import check_chosen

_NOWHERE = -1


class Step:
    """The step for one batch size, in memory at fixed addresses, so that a CUDA graph of it can be replayed.

    Attributes:
        sequence: int64 (batch, capacity + 1), the tokens given and decoded.
        position: that of the token whose embedding is in ``x``, the same in all sequences; -1 before `place`.
        logits: float32 (batch, vocab_size), of the last step.
        split: scratch memory of its attention.
    """

    def __init__(self, geometry: Geometry, weights: Weights, cache: Cache, device: Device, batch: int) -> None:
        self.geometry, self.weights, self.cache, self.device = geometry, weights, cache, device
        self.batch, self.length = batch, cache.capacity + 1
        self.streaming = batch <= FEW and geometry.width % VECTOR == 0  # those kernels read whole vectors
        width, number, place = geometry.width, device.number, device.place
        with lasting_tensors():
            self.slot, self.at = torch.zeros(2, batch, dtype=torch.int32, device=place)
            self.sequence = torch.zeros(batch, self.length, dtype=torch.int64, device=place)
            self.wanted = torch.zeros(batch, self.length, dtype=torch.bool, device=place)
            self.images = torch.zeros(batch, dtype=torch.int64, device=place)
            self.places = torch.zeros(2, self.length, dtype=torch.int64, device=place)
            self.options = torch.zeros(
                len(device.kernels.options_bytes(True, 1, 0, 1, 0, 1)), dtype=torch.uint8, device=place
            )
            self.errors = torch.zeros(batch, dtype=torch.int32, device=place)

            def empty(columns: int, dtype: torch.dtype) -> Tensor:
                return torch.empty(batch, columns, dtype=dtype, device=place)

            self.x, self.widened = empty(width, torch.float32), empty(width, torch.float32)
            self.logits = empty(geometry.vocab_size, torch.float32)
            self.normed, self.y, self.joined = (empty(width, number) for _ in range(3))
            self.qkv, self.inner = empty(3 * width, number), empty(4 * width, number)
            self.split = cache.split(batch, cache.capacity)
        self.position = _NOWHERE
        self._replayed = Replayed(place)

    @staticmethod
    def bytes(geometry: Geometry, cache: Cache, device: Device, batch: int) -> int:
        """Approximate bytes of such a step."""
        return geometry.activation_bytes(batch, device.number) + batch * 9 * (cache.capacity + 1)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that outlive a call."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))
        yield from self.split.tensors()

    def begin(self, request: DecodeRequest) -> None:
        """Copies the sequences, steps and options of a `decode` call to the device."""
        place = self.device.place
        rows = self.batch // len(request.slots)  # of each sequence
        self.slot.copy_(torch.tensor(request.slots, dtype=torch.int32, device="cpu").repeat_interleave(rows))
        known = min(request.sequences.shape[1], self.length)
        self.sequence[:, :known] = request.sequences[:, :known].repeat_interleave(rows, 0)
        steps = torch.tensor(request.steps, dtype=torch.int64, device=place)
        self.wanted.zero_()
        self.wanted[:, steps] = request.wanted.to(place).repeat_interleave(rows, 0)
        self.places[:, steps] = torch.tensor([request.rows, request.columns], dtype=torch.int64, device=place)
        self.images.copy_(torch.tensor(request.images, dtype=torch.int64, device="cpu").repeat_interleave(rows))
        options = self.device.kernels.options_bytes(**request.options(self.geometry.vocab_size))
        self.options.copy_(torch.frombuffer(bytearray(options), dtype=torch.uint8))
        self.errors.zero_()
        self.position = _NOWHERE

    def place(self, position: int) -> None:
        """Moves to ``position`` in all sequences."""
        self.at.fill_(position)
        self.x.copy_(self.weights.tok_emb[self.sequence[:, position]] + self.weights.pos_emb[position])
        self.position = position

    def advance(self) -> None:
        """Feeds the token at the current position, chooses the next one and moves to it."""
        self._replayed.run(self._queue)
        self.position += 1

    def choose(self, logits: Tensor) -> None:
        """Chooses the token after the current position from logits (B, V), and moves to it."""
        self._choose(logits)
        self.position += 1

    def collect(self, sequences: Tensor, length: int) -> None:
        """Waits, and writes the first ``length`` tokens into ``sequences``; ValueError if one could not be chosen."""
        check_errors(self.errors)
        sequences[:, :length] = self.sequence[:, :length]

    # --- what is queued -------------------------------------------------------------------------------

    def _queue(self) -> None:
        self._choose(self._logits())

    def _logits(self) -> Tensor:
        """The logits of all rows, whose inputs are in ``x``."""
        return self._streamed() if self.streaming else self._multiplied()

    def _streamed(self) -> Tensor:
        """The logits, by kernels that read every weight once."""
        weights = self.weights
        for layer, held in zip(weights.layers, self.cache.layers, strict=True):
            self._linear(self.x, layer.qkv.weight, layer.qkv.bias, "store", self.qkv, layer.ln1)
            self._attend(held)
            self._linear(self.joined, layer.proj.weight, layer.proj.bias, "add", self.x)
            self._linear(self.x, layer.up.weight, layer.up.bias, "gelu", self.inner, layer.ln2)
            self._linear(self.inner, layer.down.weight, layer.down.bias, "add", self.x)
        self._linear(self.x, weights.head, None, "store_float", self.logits, weights.ln_f)
        return self.logits

    def _attend(self, held: LayerCache) -> None:
        """Writes the keys and values of all rows, and attends."""
        self.cache.attend(held, self.qkv, self.joined, self.slot, self.at, self.at, self.split, append=True)

    def _linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, out: Tensor, norm: Norm | None = None
    ) -> None:
        self.device.launch(
            "linear", x, inner=x.shape[1], columns=len(weight), x=x, ldx=x.stride(0),
            gain=None if norm is None else norm.gain, shift=None if norm is None else norm.shift,
            epsilon=0.0 if norm is None else norm.epsilon, weight=weight, bias=bias, epilogue=epilogue,
            out=out, ldo=out.stride(0),
        )  # fmt: skip

    def _multiplied(self) -> Tensor:
        """The logits, by torch's matrix products."""
        weights = self.weights
        y = bias = None
        for layer, held in zip(weights.layers, self.cache.layers, strict=True):
            self._norm(layer.ln1, y, bias)
            torch.addmm(layer.qkv.own_bias, self.normed, layer.qkv.weight.t(), out=self.qkv)
            self._attend(held)
            torch.mm(self.joined, layer.proj.weight.t(), out=self.y)
            self._norm(layer.ln2, self.y, layer.proj.bias)
            torch.mm(self.normed, layer.up.weight.t(), out=self.inner)
            self.device.launch("bias_gelu", self.inner, bias=layer.up.bias, x=self.inner, ldx=self.inner.stride(0))
            y, bias = torch.mm(self.inner, layer.down.weight.t(), out=self.y), layer.down.bias
        self._norm(weights.ln_f, y, bias)
        self.widened.copy_(self.normed)
        return torch.mm(self.widened, weights.wide_head.t(), out=self.logits)

    def _norm(self, norm: Norm, y: Tensor | None, bias: Tensor | None) -> None:
        self.device.launch(
            "add_norm", self.x, x=self.x, ldx=self.x.stride(0), y=y, ldy=self.y.stride(0), bias=bias, gain=norm.gain,
            shift=norm.shift, epsilon=norm.epsilon, out=self.normed, ldo=self.normed.stride(0),
        )  # fmt: skip

    def _choose(self, logits: Tensor) -> None:
        geometry, weights = self.geometry, self.weights
        self.device.launch(
            "choose", self.x, dtype=str(logits.dtype).removeprefix("torch."), vocab=geometry.vocab_size, logits=logits,
            ldl=logits.stride(0), options=self.options, images=self.images, places=self.places, wanted=self.wanted,
            sequence=self.sequence, length=self.length, position=self.at, tok_emb=weights.tok_emb,
            pos_emb=weights.pos_emb, positions=geometry.block_size, x=self.x, ldx=self.x.stride(0), errors=self.errors,
        )  # fmt: skip


def check_errors(errors: Tensor) -> None:
    """Waits, and raises UserError if a row, int32 (rows,), reports that its token could not be chosen."""
    found = errors.tolist()
    check_chosen(nan=any(error & 1 for error in found), nothing=any(found))
