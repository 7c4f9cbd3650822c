"""What engines and samplers require of a network, as protocols: they never look at its class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Kind:
    """What sets a transformer apart from GPT2, whose values are the defaults; a config's ``kind``.

    Attributes:
        extra_tokens: tokens that can be fed but not chosen, numbered behind the vocabulary.
        hidden: width of the MLP; 0 is 4 * n_embd.
        rms_norm: RMSNorm, without biases, in place of LayerNorm.
        gated: the MLP is ``down(silu(up(x)) * gate(x))`` in place of ``down(gelu(up(x)))``.
        rotary: queries and keys are turned by their position, in place of learned positions.
        biases: of the linear layers in blocks.
        qk_norm: the queries and keys of each head are normed by RMSNorm.
        side: the image tokens' positions are those of a square of this side, so that windows have it too; 0 is any.
    """

    extra_tokens: int = 0
    hidden: int = 0
    rms_norm: bool = False
    gated: bool = False
    rotary: bool = False
    biases: bool = True
    qk_norm: bool = False
    side: int = 0


GPT2 = Kind()


def kind_of(config: TransformerConfig) -> Kind:
    """The kind of a transformer with this config; GPT2's if it names none."""
    return getattr(config, "kind", GPT2)


def token_count(config: TransformerConfig) -> int:
    """The number of tokens that can be fed."""
    return config.vocab_size + kind_of(config).extra_tokens


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that the engines read, by its name in the state dict of a `GPT`.

    The other kinds' names follow them: ``mlp.gate``, and as ``pos_emb`` the cosine and sine of each pair of a head.
    """
    kind, width, vocab = kind_of(config), config.n_embd, config.vocab_size
    hidden = kind.hidden or 4 * width
    positions = (config.block_size, width // config.n_head) if kind.rotary else (1, config.block_size, width)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (token_count(config), width), "pos_emb": positions, "head.weight": (vocab, width),
    }  # fmt: skip
    linear = {**dict.fromkeys(("attn.query", "attn.key", "attn.value", "attn.proj"), (width, width)),
              "mlp.0": (hidden, width), "mlp.2": (width, hidden)}  # fmt: skip
    if kind.gated:
        linear["mlp.gate"] = (hidden, width)
    blocks = [f"blocks.{i}." for i in range(config.n_layer)]
    for norm in ("ln_f", *(block + norm for block in blocks for norm in ("ln1", "ln2"))):
        shapes[f"{norm}.weight"] = (width,)
        if not kind.rms_norm:
            shapes[f"{norm}.bias"] = (width,)
    for block in blocks:
        if kind.qk_norm:
            head = (width // config.n_head,)
            shapes |= {f"{block}attn.query_norm.weight": head, f"{block}attn.key_norm.weight": head}
        for name, shape in linear.items():
            shapes[f"{block}{name}.weight"] = shape
            if kind.biases:
                shapes[f"{block}{name}.bias"] = shape[:1]
    return shapes


def checked_parameters(gpt: Transformer) -> dict[str, Tensor]:
    """The parameters that the engines read, by name, detached. Engines read memory by the config's sizes.

    A transformer whose state dict has other names gives them in ``engine_parameters()``. Raises ValueError unless all
    have the shapes that the config says: each can be changed without the other.
    """
    described = getattr(gpt, "engine_parameters", None)
    named = dict(gpt.named_parameters()) if described is None else described()
    found = {}
    for name, shape in parameter_shapes(gpt.config).items():
        got = tuple(named[name].shape) if name in named else "no such parameter"
        if got != shape:
            raise ValueError(f"{name}: got {got}, expected {shape}, as the transformer's config says")
        found[name] = named[name].detach()
    return found


class Transformer(Protocol):
    """A transformer such as `tamingfast.models.gpt.GPT`: its parameters, and two kinds of cache."""

    config: TransformerConfig
    block_size: int
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
