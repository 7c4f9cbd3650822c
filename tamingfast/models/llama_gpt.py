"""LlamaGen's transformer over image tokens: RMSNorm, SwiGLU, rotary positions in two dimensions, classes of its own.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", 2024, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.engines.networks import Kind, LayerCache
from tamingfast.engines.request import Span
from tamingfast.models.base import at_least
from tamingfast.models.gpt import GPTConfig, RMSNorm, attend_ragged, last_of

_MULTIPLE = 256  # of which the MLP's width is one, unless it is given


class RotaryAttention(nn.Module):
    """Multi-head causal attention, whose queries and keys are turned by their positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def _heads(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.wqkv(x).chunk(3, dim=-1))
        return turned(q, turns), turned(k, turns), v

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x (B, T, width), turns (T, D / 2, 2) -> (B, T, width)."""
        return self.wo(ops.causal_attention(*self._heads(x, turns)).transpose(1, 2).flatten(2))

    def forward_ragged(
        self, x: Tensor, turns: Tensor, cache: LayerCache, spans: Sequence[Span], asked: Sequence[int]
    ) -> Tensor:
        """As `forward`, for the concatenated spans; see `tamingfast.models.gpt.CausalSelfAttention.forward_ragged`."""
        q, k, v = self._heads(x, turns)
        q = last_of(q.transpose(1, 2), spans, asked).transpose(1, 2)
        return self.wo(attend_ragged(q, k, v, cache, spans, asked).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``w2(silu(w1(x)) * w3(x))``."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    """Attention, then an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attention = RotaryAttention(width, heads)
        self.feed_forward = FeedForward(width, hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))

    def forward_ragged(
        self, x: Tensor, turns: Tensor, cache: LayerCache, spans: Sequence[Span], asked: Sequence[int]
    ) -> Tensor:
        attended = self.attention.forward_ragged(self.attention_norm(x), turns, cache, spans, asked)
        x = last_of(x, spans, asked) + attended
        return x + self.feed_forward(self.ffn_norm(x))


class LlamaGPT(nn.Module):
    """A class-conditional transformer; its state dict has the names of LlamaGen's.

    A sequence begins with the class; class i is the token ``vocab_size + i``, and class ``n_classes`` stands for none.
    The image tokens after it form a square in raster order.

    Args:
        vocab_size: entries of the codebook.
        n_classes: without the null class.
        block_size: image tokens, a square number; all but the last are fed.
        hidden: width of the MLP; None is 8/3 n_embd, rounded up to a multiple of 256.
        rope_base: of the frequencies of the rotary positions.

    Raises:
        ValueError: a size below 1, a block size that is no square, or heads whose width is no multiple of 4.
    """

    config: GPTConfig

    def __init__(
        self,
        vocab_size: int,
        n_classes: int = 1000,
        block_size: int = 256,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        hidden: int | None = None,
        rope_base: float = 10000.0,
    ):
        super().__init__()
        at_least(1, vocab_size=vocab_size, n_classes=n_classes, block_size=block_size, n_head=n_head, n_embd=n_embd)
        at_least(0, n_layer=n_layer)
        side, head = math.isqrt(block_size), n_embd // n_head
        if side * side != block_size:
            raise ValueError(f"block_size: got {block_size}, expected a square number of image tokens")
        if n_embd % n_head or head % 4:
            raise ValueError(f"n_head: got {n_head} for n_embd={n_embd}, expected heads of a width divisible by 4")
        hidden = -(-int(8 * n_embd / 3) // _MULTIPLE) * _MULTIPLE if hidden is None else hidden
        at_least(1, hidden=hidden)
        self.config = GPTConfig(
            vocab_size, block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
            kind=Kind(
                extra_tokens=n_classes + 1, hidden=hidden, rms_norm=True, gated=True, rotary=True, biases=False,
                side=side,
            ),
        )  # fmt: skip
        self.block_size, self.n_classes = block_size, n_classes
        self.tok_embeddings = nn.Embedding(vocab_size, n_embd)
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(n_classes + 1, n_embd)})
        self.layers = nn.ModuleList(LlamaBlock(n_embd, n_head, hidden) for _ in range(n_layer))
        self.norm = RMSNorm(n_embd)
        self.output = nn.Linear(n_embd, vocab_size, bias=False)
        # Not a buffer: a cast of the module would round it.
        self.turns = turns_of(side, head, rope_base)[:block_size]
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def get_block_size(self) -> int:
        """The greatest length of a sequence, in tokens."""
        return self.block_size

    def class_tokens(self, labels: Tensor) -> Tensor:
        """Labels int64 (B,), ``n_classes`` for none -> the tokens (B, 1) that sequences begin with."""
        return labels[:, None] + self.config.vocab_size

    def forward(self, idx: Tensor, labels: Tensor | None = None) -> tuple[Tensor, None]:
        """Tokens int64 (B, T) -> ``(logits (B, T, vocab_size), None)``.

        The first is a class, or, with ``labels`` (B,), those are put before them: logits (B, 1 + T, vocab_size).
        Raises ValueError if the sequence is longer than ``block_size``.
        """
        idx = idx if labels is None else torch.cat((self.class_tokens(labels), idx), dim=1)
        self._check_length(idx.shape[1])
        x, turns = self._embed(idx), self._turns(torch.arange(idx.shape[1], dtype=torch.int64, device=idx.device))
        for layer in self._layers:
            x = layer(x, turns)
        return self.output(self.norm(x)), None

    def new_cache(self, batch: int, length: int | None = None) -> list[LayerCache]:
        """Uninitialised keys and values of each layer, (B, n_head, length, D); default ``length``: ``block_size``."""
        return self._empty_cache((batch,), self.block_size if length is None else length)

    def forward_cached(self, idx: Tensor, cache: list[LayerCache], start: int) -> Tensor:
        """Logits (B, t, vocab_size) of tokens (B, t) at positions from ``start`` on, given the ``cache`` before them.

        Raises ValueError for positions beyond the cache.
        """
        span, capacity = Span(0, start, idx.shape[1]), cache[0][0].shape[2]
        if span.stop > capacity:
            raise ValueError(
                f"idx: got positions up to {span.stop - 1}, expected at most {capacity - 1}, the cache's last"
            )
        slots = [(keys[None], values[None]) for keys, values in cache]
        return self.forward_ragged(idx, slots, [span], [span.count])

    def new_slots(self, slots: int, batch: int, length: int) -> list[LayerCache]:
        """Uninitialised caches for `forward_ragged`: keys and values (slots, B, n_head, length, D) of each layer."""
        return self._empty_cache((slots, batch), length)

    def forward_ragged(
        self, idx: Tensor, cache: list[LayerCache], spans: Sequence[Span], asked: Sequence[int] | None = None
    ) -> Tensor:
        """As `tamingfast.models.gpt.GPT.forward_ragged`."""
        whole = [span.count for span in spans]
        asked = [1] * len(spans) if asked is None else asked
        positions = torch.cat(
            [torch.arange(span.start, span.stop, dtype=torch.int64, device=idx.device) for span in spans]
        )
        x, turns, last = self._embed(idx), self._turns(positions), len(self.layers) - 1
        for i, (layer, own) in enumerate(zip(self._layers, cache, strict=True)):
            x = layer.forward_ragged(x, turns, own, spans, asked if i == last else whole)
        return self.output(self.norm(x))

    def engine_parameters(self) -> dict[str, Tensor]:
        """What `tamingfast.engines.networks.parameter_shapes` asks for."""
        found = {
            "tok_emb.weight": torch.cat((self.tok_embeddings.weight, self._classes.weight)),
            "pos_emb": self.turns.flatten(1), "ln_f.weight": self.norm.weight, "head.weight": self.output.weight,
        }  # fmt: skip
        for i, layer in enumerate(self._layers):
            query, key, value = layer.attention.wqkv.weight.chunk(3)
            own = {
                "ln1": layer.attention_norm.weight, "ln2": layer.ffn_norm.weight, "attn.query": query,
                "attn.key": key, "attn.value": value, "attn.proj": layer.attention.wo.weight,
                "mlp.0": layer.feed_forward.w1.weight, "mlp.gate": layer.feed_forward.w3.weight,
                "mlp.2": layer.feed_forward.w2.weight,
            }  # fmt: skip
            found |= {f"blocks.{i}.{name}.weight": weight for name, weight in own.items()}
        return found

    @property
    def _layers(self) -> list[LlamaBlock]:
        return cast("list[LlamaBlock]", list(self.layers))

    @property
    def _classes(self) -> nn.Embedding:
        table = self.cls_embedding["embedding_table"]
        assert isinstance(table, nn.Embedding)
        return table

    def _embed(self, idx: Tensor) -> Tensor:
        vocab = self.config.vocab_size
        own, classes = self.tok_embeddings(idx.clamp(max=vocab - 1)), self._classes((idx - vocab).clamp(min=0))
        return torch.where((idx < vocab)[..., None], own, classes)

    def _turns(self, positions: Tensor) -> Tensor:
        if self.turns.device != positions.device:
            self.turns = self.turns.to(positions.device)
        return self.turns[positions]

    def _empty_cache(self, leading: tuple[int, ...], length: int) -> list[LayerCache]:
        self._check_length(length)
        weight, heads = self.output.weight, self.config.n_head
        shape = (*leading, heads, length, self.config.n_embd // heads)
        return [(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.layers]

    def _check_length(self, length: int) -> None:
        if length > self.block_size:
            raise ValueError(f"length: got {length} tokens, expected at most block_size={self.block_size}")


def turns_of(side: int, width: int, base: float = 10000.0) -> Tensor:
    """Cosine and sine for each position and pair of a head's values: float32 (1 + side * side, width / 2, 2).

    The first half of the pairs turns by the row, the second by the column. At position 0, that of the class, cosine and
    sine are both 0, as in LlamaGen's code, which makes the class's query and key zero vectors.
    """
    half = width // 2
    steps = torch.arange(half // 2, dtype=torch.float32, device="cpu") * 2
    frequencies = 1.0 / base ** (steps / half)
    angles = torch.outer(torch.arange(side, dtype=torch.float32, device="cpu"), frequencies)
    rows = angles[:, None].expand(-1, side, -1)
    grid = torch.cat((rows, rows.transpose(0, 1)), dim=-1).flatten(0, 1)
    turns = torch.stack((grid.cos(), grid.sin()), dim=-1)
    return torch.cat((torch.zeros_like(turns[:1]), turns))


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs (2k, 2k + 1) of x (B, H, T, D) turned by turns (T, D / 2, 2), in float32; the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).type_as(x)
