"""What engines and samplers require of a network, as protocols: they never look at its class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tamingfast.engines.request import Span

#: One layer's keys and values.
LayerCache = tuple[Tensor, Tensor]


class TransformerConfig(Protocol):
    """The sizes of a GPT."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_unmasked: int


class Transformer(Protocol):
    """A GPT2 such as `tamingfast.models.gpt.GPT`: parameters under the original's names, and two kinds of cache."""

    config: TransformerConfig
    block_size: int
    pos_emb: nn.Parameter
    ln_f: nn.LayerNorm
    training: bool

    def __call__(self, idx: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens int64 (B, T) -> logits (B, T, vocab_size), and a loss, None here."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...

    def to(self, dtype: torch.dtype) -> Any: ...

    def new_cache(self, batch: int, length: int | None = None) -> list[LayerCache]: ...

    def forward_cached(self, idx: Tensor, cache: list[LayerCache], start: int) -> Tensor: ...

    def new_slots(self, slots: int, batch: int, length: int) -> list[LayerCache]: ...

    def forward_ragged(
        self, idx: Tensor, cache: list[LayerCache], spans: Sequence[Span], asked: Sequence[int] | None = None
    ) -> Tensor: ...
