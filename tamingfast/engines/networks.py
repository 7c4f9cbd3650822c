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


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that the engines read, by its name in the state dict."""
    width, vocab = config.n_embd, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (vocab, width), "pos_emb": (1, config.block_size, width), "head.weight": (vocab, width),
        "ln_f.weight": (width,), "ln_f.bias": (width,),
    }  # fmt: skip
    linear = {**dict.fromkeys(("attn.query", "attn.key", "attn.value", "attn.proj"), (width, width)),
              "mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}  # fmt: skip
    for block in (f"blocks.{i}" for i in range(config.n_layer)):
        for norm in ("ln1", "ln2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (width,)
        for name, shape in linear.items():
            shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"] = shape, shape[:1]
    return shapes


def checked_parameters(gpt: Transformer) -> dict[str, Tensor]:
    """The parameters that the engines read, by name, detached. Engines read memory by the config's sizes.

    Raises ValueError unless all have the shapes that the config says: each can be changed without the other.
    """
    named, found = dict(gpt.named_parameters()), {}
    for name, shape in parameter_shapes(gpt.config).items():
        got = tuple(named[name].shape) if name in named else "no such parameter"
        if got != shape:
            raise ValueError(f"{name}: got {got}, expected {shape}, as the transformer's config says")
        found[name] = named[name].detach()
    return found


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

    def forward_ragged(self, idx: Tensor, cache: list[LayerCache], spans: Sequence[Span]) -> Tensor: ...
