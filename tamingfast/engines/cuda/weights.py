"""The engine's copy of a GPT's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # float32 (out,)
    own_bias: Tensor | None = None  # of the weight's type


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
    """Embeddings and what is not a matrix in float32, matrices in the engine's type, on the GPT's device."""

    def __init__(self, gpt: nn.Module, number: torch.dtype) -> None:
        def copied(value: Tensor, dtype: torch.dtype) -> Tensor:
            return value.detach().to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)

        def linear(*modules: nn.Linear) -> Linear:
            weight = copied(torch.cat([module.weight for module in modules]), number)
            if modules[0].bias is None:
                return Linear(weight)
            bias = torch.cat([module.bias for module in modules])
            return Linear(weight, copied(bias, torch.float32), copied(bias, number))

        def norm(module: nn.LayerNorm) -> Norm:
            return Norm(copied(module.weight, torch.float32), copied(module.bias, torch.float32), module.eps)

        self.tok_emb = copied(gpt.tok_emb.weight, torch.float32)
        self.pos_emb = copied(gpt.pos_emb[0], torch.float32)
        self.layers = [
            Layer(
                norm(block.ln1), linear(block.attn.query, block.attn.key, block.attn.value), linear(block.attn.proj),
                norm(block.ln2), linear(block.mlp[0]), linear(block.mlp[2]),
            )
            for block in gpt.blocks
        ]  # fmt: skip
        self.ln_f, self.head = norm(gpt.ln_f), linear(gpt.head)
        # For torch's product, which rounds to the type of its inputs: tokens are chosen from float32 logits.
        self.wide_head = self.head.weight.float()

    def matrix_bytes(self) -> int:
        """Read for every token."""
        matrices = [self.head, *(m for x in self.layers for m in (x.qkv, x.proj, x.up, x.down))]
        return sum(matrix.weight.nbytes for matrix in matrices)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.tok_emb, self.pos_emb, self.head.weight, self.wide_head, self.ln_f.gain, self.ln_f.shift)
        for layer in self.layers:
            for part in vars(layer).values():
                yield from (value for value in vars(part).values() if isinstance(value, Tensor))
