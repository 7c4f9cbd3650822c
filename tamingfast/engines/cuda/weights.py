"""The engine's copy of a GPT's weights, and the GPT's sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tamingfast.engines.cuda.device import VECTOR
from tamingfast.engines.networks import Transformer, checked_parameters


@dataclass(frozen=True)
class Geometry:
    """Sizes of a GPT."""

    vocab_size: int
    block_size: int
    layers: int
    heads: int
    width: int
    n_unmasked: int  # 0 or at least 2: a prefix of one position is the plain causal mask

    @classmethod
    def of(cls, gpt: Transformer) -> Geometry:
        config = gpt.config
        n_unmasked = getattr(config, "n_unmasked", 0)  # configs of the original may lack it
        return cls(
            config.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd,
            n_unmasked if n_unmasked > 1 else 0,
        )  # fmt: skip

    @property
    def head(self) -> int:
        """Elements of a head."""
        return self.width // self.heads

    @property
    def stride(self) -> int:
        """Elements from one cached position of a head to the next."""
        return math.ceil(self.head / VECTOR) * VECTOR

    def activation_bytes(self, rows: int, number: torch.dtype) -> int:
        """Approximate bytes of the activations of that many tokens, logits included."""
        return rows * ((8 + 10 * number.itemsize) * self.width + 4 * self.vocab_size)


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor  # float32 (out,)
    own_bias: Tensor  # of the weight's type


@dataclass(frozen=True)
class Norm:
    gain: Tensor  # float32
    shift: Tensor
    epsilon: float


@dataclass(frozen=True)
class Layer:
    ln1: Norm
    qkv: Linear
    proj: Linear
    ln2: Norm
    up: Linear
    down: Linear


class Weights:
    """Matrices in the engine's type, embeddings, biases and norms in float32, on the GPT's device."""

    def __init__(self, gpt: Transformer, number: torch.dtype) -> None:
        named = checked_parameters(gpt)
        epsilon = cast(Any, gpt).ln_f.eps  # the same in all norms of a GPT

        def copied(value: Tensor, dtype: torch.dtype) -> Tensor:
            return value.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)

        def linear(*names: str) -> Linear:
            weight, bias = (torch.cat([named[f"{name}.{part}"] for name in names]) for part in ("weight", "bias"))
            return Linear(copied(weight, number), copied(bias, torch.float32), copied(bias, number))

        def norm(name: str) -> Norm:
            gain, shift = (copied(named[f"{name}.{part}"], torch.float32) for part in ("weight", "bias"))
            return Norm(gain, shift, epsilon)

        self.tok_emb = copied(named["tok_emb.weight"], torch.float32)
        self.pos_emb = copied(named["pos_emb"][0], torch.float32)
        self.layers = [
            Layer(
                norm(f"{block}.ln1"), linear(*(f"{block}.attn.{part}" for part in ("query", "key", "value"))),
                linear(f"{block}.attn.proj"), norm(f"{block}.ln2"), linear(f"{block}.mlp.0"), linear(f"{block}.mlp.2"),
            )
            for block in (f"blocks.{i}" for i in range(gpt.config.n_layer))
        ]  # fmt: skip
        self.ln_f, self.head = norm("ln_f"), copied(named["head.weight"], number)
        # Tokens are chosen from float32 logits, but torch's matrix product rounds its result to the type of its inputs.
        self.wide_head = self.head.float()

    def matrix_bytes(self) -> int:
        """Bytes that are read for every token."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.proj, layer.up, layer.down)]
        return self.head.nbytes + sum(linear.weight.nbytes for linear in linears)

    def tensors(self) -> Iterator[Tensor]:
        """All of its tensors."""
        yield from (self.tok_emb, self.pos_emb, self.head, self.wide_head, self.ln_f.gain, self.ln_f.shift)
        for layer in self.layers:
            for part in vars(layer).values():
                yield from (value for value in vars(part).values() if isinstance(value, Tensor))
