"""Passes over known tokens: everything that is fed several tokens at a time, outside the step of fixed shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tamingfast import ops
from tamingfast.engines.cuda.cache import Cache, Split
from tamingfast.engines.cuda.device import Device
from tamingfast.engines.cuda.rows import Group, Rows, batches
from tamingfast.engines.cuda.weights import Geometry, Norm, Weights
from tamingfast.engines.networks import LayerCache
from tamingfast.engines.request import Span

_TOKENS_PER_PASS = 8192  # enough to fill any GPU


class Passes:
    """Feeds spans of tokens into the cache by torch's matrix products and the kernels."""

    def __init__(self, geometry: Geometry, weights: Weights, cache: Cache, device: Device) -> None:
        self.geometry, self.weights, self.cache, self.device = geometry, weights, cache, device

    def feed(self, tokens: Tensor, spans: list[Span], logits: str) -> Tensor:
        """Feeds the spans' tokens in turn, int64 (T,) on the device; returns float32 logits of the requested rows.

        Raises MemoryError, with the bytes of the activations, if they do not fit.
        """
        if not spans:
            return torch.empty(0, self.geometry.vocab_size, dtype=torch.float32, device=self.device.place)
        found, at = [], 0
        size = self.geometry.activation_bytes(min(len(tokens), _TOKENS_PER_PASS), self.device.number)
        with self.device.memory_for("activations", size):
            for part in batches(spans, _TOKENS_PER_PASS):
                count = sum(span.count for span in part)
                found.append(self._pass(tokens[at : at + count], part, logits))
                at += count
            return torch.cat(found)

    def feed_columns(self, sequences: Tensor, slots: list[int], start: int, stop: int, logits: str) -> Tensor:
        """Feeds positions ``start`` to ``stop`` - 1 of all sequences, int64 (B, L) on the device, to their slots."""
        spans = [Span(slot, start, stop - start) for slot in slots]
        return self.feed(sequences[:, start:stop].flatten(), spans, logits)

    def _pass(self, tokens: Tensor, spans: list[Span], logits: str) -> Tensor:
        geometry, weights, cache = self.geometry, self.weights, self.cache
        position_bytes = 2 * geometry.heads * geometry.stride * self.device.number.itemsize
        rows = Rows(spans, geometry.n_unmasked, position_bytes, self.device.place)
        for span in spans:  # overwritten positions are no longer valid, even if this is interrupted
            cache.hold(span.slot, min(cache.length(span.slot), span.start))
        splits = [None if group.alike else cache.split(group.stop - group.first, rows.longest) for group in rows.groups]
        x = weights.tok_emb[tokens] + weights.pos_emb[rows.position.long()]
        for layer, held in zip(weights.layers, cache.layers, strict=True):
            qkv = F.linear(self._normed(x, layer.ln1), layer.qkv.weight, layer.qkv.own_bias)
            y = F.linear(self._attended(qkv, rows, splits, held), layer.proj.weight)
            inner = F.linear(self._normed(x, layer.ln2, y, layer.proj.bias), layer.up.weight)
            self.device.launch("bias_gelu", inner, bias=layer.up.bias, x=inner, ldx=inner.stride(0))
            x += F.linear(inner, layer.down.weight, layer.down.own_bias)
        for span in spans:
            cache.hold(span.slot, span.stop)
        asked = {"none": x[:0], "last": x[rows.ends], "all": x}[logits]
        return F.linear(self._normed(asked, weights.ln_f).float(), weights.wide_head)

    def _normed(self, x: Tensor, norm: Norm, y: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """The norm of x, after y + bias is added to x in place."""
        out = torch.empty(x.shape, dtype=self.device.number, device=self.device.place)
        self.device.launch(
            "add_norm", x, x=x, ldx=x.stride(0), y=y, ldy=1 if y is None else y.stride(0), bias=bias, gain=norm.gain,
            shift=norm.shift, epsilon=norm.epsilon, out=out, ldo=out.stride(0),
        )  # fmt: skip
        return out

    def _attended(self, qkv: Tensor, rows: Rows, splits: list[Split | None], held: LayerCache) -> Tensor:
        """Attention (R, W) of all rows, whose keys and values are appended to the layer's cache first."""
        out = torch.empty(len(qkv), self.geometry.width, dtype=self.device.number, device=self.device.place)
        self.cache.append(held, qkv, rows.slot, rows.position)
        for group, split in zip(rows.groups, splits, strict=True):
            some = slice(group.first, group.stop)
            slot, position, last = (part[some] for part in (rows.slot, rows.position, rows.last))
            if split is None:
                out[some] = self._in_tiles(qkv[some], group, slot, held)
            else:
                self.cache.attend(held, qkv[some], out[some], slot, position, last, split, append=False)
        return out

    def _in_tiles(self, qkv: Tensor, group: Group, slot: Tensor, held: LayerCache) -> Tensor:
        """Attention (R, W) of the rows of a group of equal spans."""
        heads, width = self.geometry.heads, self.geometry.head
        q, k, v = qkv.view(group.alike, -1, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        if group.start:
            seen = (slot[:: group.count].long(), slice(None), slice(group.start + group.count), slice(width))
            k, v = held[0][seen], held[1][seen]
            q = F.pad(q, (0, 0, group.start, 0))  # the op needs as many queries as keys
        n_unmasked = 0 if group.start else self.geometry.n_unmasked  # after the prefix, attention is causal
        attended = ops.causal_attention(q, k, v, n_unmasked=n_unmasked)[:, :, group.start :]
        return attended.transpose(1, 2).reshape(len(qkv), -1)
