"""LlamaGen's transformer of the size B (111M: 12 layers, 12 heads, width 768, 16384 codes), 256 tokens an image, CPU.

The baseline decodes as the public code does: float32, eager, conditional and unconditional rows in one batch, for every
token attention over the whole preallocated cache under a mask, then top-k and `torch.multinomial`. It is written anew
here, with our modules' weights. Beside it: our torch engine, whose attention ends at the last token. The weights are
random, so that nothing can be guessed, and lookahead is left out.

Ratios come from `PLACES` lengths, evenly spaced over the 256, at each of which one after the other takes its steps. So
other load on the machine affects all of them.
"""

from __future__ import annotations

import functools
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tamingfast.engines import DecodeRequest, GPTEngine
from tamingfast.engines.request import Second
from tamingfast.models.llama_gpt import LlamaGPT, turned
from tamingfast.ops import backends
from tamingfast.ops.choice import Choice, guided

TOKENS, SCALE, TOP_K, ROUNDS = 256, 4.0, 2000, 3
PLACES, QUICK_PLACES, RUN = 12, 3, 4  # lengths that are compared, and steps at each

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)


@functools.cache
def size_b() -> LlamaGPT:
    torch.manual_seed(0)
    return LlamaGPT(16384, 1000, TOKENS, n_layer=12, n_head=12, n_embd=768).eval()


class AsPublished:
    """The public code's way: every step attends to all positions of the cache, the later ones masked."""

    def __init__(self, gpt: LlamaGPT, batch: int) -> None:
        self.gpt = gpt
        shape = (batch, gpt.config.n_head, TOKENS, gpt.config.n_embd // gpt.config.n_head)
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in gpt.layers]
        self.mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()

    def logits(self, tokens: Tensor, position: int) -> Tensor:
        """Logits (B, V) after tokens (B, 1) at ``position``."""
        gpt, place = self.gpt, torch.tensor([position])
        x, turns = gpt._embed(tokens), gpt.turns[place]
        for layer, (keys, values) in zip(gpt.layers, self.cache, strict=True):
            attention = layer.attention
            parts = attention.wqkv(layer.attention_norm(x)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in parts)
            keys[:, :, place], values[:, :, place] = turned(k, turns), v
            y = F.scaled_dot_product_attention(turned(q, turns), keys, values, attn_mask=self.mask[place])
            x = x + attention.wo(y.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return gpt.output(gpt.norm(x))[:, -1]


class OurTorch:
    """Our static cache in torch."""

    def __init__(self, gpt: LlamaGPT, batch: int) -> None:
        self.gpt, self.cache = gpt, [(k.zero_(), v.zero_()) for k, v in gpt.new_cache(batch)]

    def logits(self, tokens: Tensor, position: int) -> Tensor:
        return self.gpt.forward_cached(tokens, self.cache, position)[:, -1]


@torch.no_grad()
def rival_step(model: AsPublished | OurTorch, images: int, position: int) -> float:
    """Seconds of a guided step, its choice included."""
    tokens = torch.zeros(2 * images, 1, dtype=torch.int64)
    begun = time.perf_counter()
    logits = guided(*model.logits(tokens, position).chunk(2), torch.tensor(SCALE))
    kept = logits.masked_fill(logits < logits.topk(TOP_K).values[..., -1:], -torch.inf)
    torch.multinomial(kept.softmax(-1), 1)
    return time.perf_counter() - begun


def asked(images: int, sequences: Tensor, steps: range, fed: int = 0) -> DecodeRequest:
    second = Second(range(images, 2 * images), 16384 + 1000, 1, [SCALE] * len(steps))
    return DecodeRequest(
        slots=range(images), sequences=sequences, steps=steps, fed=fed, choice=Choice(top_k=TOP_K), lookahead=1,
        second=second,
    )  # fmt: skip


def our_step(engine: GPTEngine, images: int, position: int) -> float:
    """Seconds of a guided step, the mean of `RUN` from that position on."""
    sequences = begun_with(images)
    first = max(position, 1)
    engine.decode(asked(images, sequences, range(first, first + 1)))
    begun = time.perf_counter()
    engine.decode(asked(images, sequences, range(first + 1, first + 1 + RUN), fed=first))
    return (time.perf_counter() - begun) / RUN


def begun_with(images: int) -> Tensor:
    """Sequences that begin with classes, int64 (images, 1 + TOKENS)."""
    sequences = torch.zeros(images, TOKENS + 1, dtype=torch.int64)
    sequences[:, :1] = size_b().class_tokens(torch.arange(images))
    return sequences


@torch.no_grad()
def validate(engine: GPTEngine, dtype: str, images: int) -> None:
    """The engine's logits are near the baseline's, of both sequences."""
    baseline, sequences = AsPublished(size_b(), images), begun_with(images)
    engine.decode(asked(images, sequences, range(1, 9)))
    tolerance = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}[dtype]
    for position in range(8):
        expected = baseline.logits(sequences[:, position : position + 1], position)
        logits = engine.step([(b, position, [int(sequences[b, position])]) for b in range(images)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


@pytest.mark.quick(images=1)
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_llama_gpt(benchmark, quick, dtype, images):
    engine = GPTEngine(size_b(), dtype)
    engine.reserve(2 * images, TOKENS)
    validate(engine, dtype, images)
    rivals = {"as published": AsPublished(size_b(), 2 * images), "our torch": OurTorch(size_b(), 2 * images)}
    spent: dict[str, list[float]] = {name: [] for name in ("ours", *rivals)}
    for position in torch.linspace(1, TOKENS - RUN - 2, QUICK_PLACES if quick else PLACES).long().tolist():
        spent["ours"].append(our_step(engine, images, position))
        for name, rival in rivals.items():
            rival_step(rival, images, position - 1)
            spent[name].append(rival_step(rival, images, position))
    rounds = 1 if quick else ROUNDS
    benchmark.pedantic(
        lambda: engine.decode(asked(images, begun_with(images), range(1, TOKENS + 1))),
        warmup_rounds=rounds > 1, rounds=rounds,
    )  # fmt: skip
    ratio = {
        name: statistics.median(theirs / mine for theirs, mine in zip(spent[name], spent["ours"], strict=True))
        for name in rivals
    }
    rate = {name: images / statistics.mean(seconds) for name, seconds in spent.items()}
    whole = images * TOKENS / benchmark.stats.stats.median
    benchmark.extra_info |= {"ratio": ratio, "tokens_per_second": rate, "whole_image_tokens_per_second": whole}
    print(f"\n  {whole:.1f} tokens/s, guided; " + ", ".join(f"{value:.2f}x {name}" for name, value in ratio.items()))
