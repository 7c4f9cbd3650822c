"""Decoding of a GPT2-small prior (12 layers, 16 heads, width 768, 1024 codes), 256 tokens per image, on the CPU.

The baseline is the loop of the original's cached sampler: float32, eager, one token at a time, keys and values of all
layers grown with `torch.cat`. Beside it: Hugging Face's GPT2 with its cache (if `transformers` is installed), and our
torch engine's static cache. All sample with top-k 100. The benchmark's own figure is a whole run. Ratios and the share
of the limit come from `PLACES` lengths, evenly spaced over the 256: at each, the machine's bandwidth is measured, our
engine takes a few steps, the bandwidth is measured again, and the rivals take theirs. Other load on the machine then
affects all of them, and the bandwidth is known for the moment of our steps, even if it changes from second to second
as under a hypervisor.

The limit of a step is the larger of bytes / bandwidth and operations / rate: every weight read once, every visible key
and value read once; two operations per weight and image.
"""

from __future__ import annotations

import functools
import statistics
import time

import pytest
import torch
from decoding import TOP_K, GrowingCache, HuggingFace, StaticCache, request, sample
from measuring import limits

from tamingfast.engines import GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.ops.choice import choose, gumbel_noise

TOKENS, ROUNDS = 256, 3
PLACES, QUICK_PLACES, RUN = 16, 3, 8  # number of lengths that are compared, and of our steps at each

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)


@torch.no_grad()
def rival_step(model, batch: int, length: int) -> float:
    """Seconds of a step after `length` tokens; one step before it warms up."""
    model.jump(length - 1, batch)
    sample(model, batch, 1, length - 1)
    start = time.perf_counter()
    sample(model, batch, 1, length)
    return time.perf_counter() - start


def our_step(engine: GPTEngine, batch: int, length: int) -> float:
    """Seconds of a step, the mean of `RUN` of them around that length, the call into the extension included."""
    sequences = torch.zeros(batch, TOKENS + 1, dtype=torch.int64)
    first = max(length - RUN // 2, 0)
    if first:
        engine.decode(request(sequences, [first]))
    start = time.perf_counter()
    engine.decode(request(sequences, range(first + 1, first + RUN + 1), fed=first))
    return (time.perf_counter() - start) / RUN


@functools.cache
def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(1024, TOKENS, n_layer=12, n_head=16, n_embd=768).eval()


@functools.cache
def rivals(batch: int) -> dict[str, object]:
    found = {"original": GrowingCache, "static cache": StaticCache}
    if HuggingFace.installed():
        found["hugging face"] = HuggingFace
    return {name: rival(small_gpt(), batch) for name, rival in found.items()}


@torch.no_grad()
def validate(engine: GPTEngine, dtype: str, batch: int) -> None:
    """The engine's tokens are what its logits and the noise imply, and its logits are near the baseline's."""
    gpt, baseline = small_gpt(), GrowingCache(small_gpt(), batch)
    sequences = torch.zeros(batch, 9, dtype=torch.int64)
    engine.decode(request(sequences, range(1, 9)))
    tolerance = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}[dtype]
    for position in range(8):
        expected = baseline.logits(sequences[:, position : position + 1], position)
        logits = engine.step([(b, position, [int(sequences[b, position])]) for b in range(batch)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
        noise = gumbel_noise(1, torch.arange(batch), torch.tensor(0), torch.tensor(position + 1), gpt.config.vocab_size)
        assert choose(logits, noise, top_k=TOP_K).tolist() == sequences[:, position + 1].tolist()


def limit_of_step(engine: GPTEngine, dtype: str, batch: int, length: int, most: dict[str, float]) -> dict[str, float]:
    """The shortest possible time of a step after `length` tokens, in seconds, under each of its limits."""
    config = small_gpt().config
    parameters = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    pairs = 2 * (length + 1) * config.n_embd * config.n_layer * batch  # keys and values
    size = engine.info()["weight_bytes"] + pairs * (4 if dtype == "float32" else 2)
    rate = most["float32_gflop_per_s" if dtype == "float32" else "bfloat16_gflop_per_s"]
    return {
        "bandwidth": size / most["gb_per_s"] / 1e9,
        "arithmetic": 2 * (parameters * batch + pairs) / rate / 1e9,
    }


def compare(engine: GPTEngine, dtype: str, batch: int, places: int) -> dict:
    """Ours and the rivals side by side at so many lengths: mean seconds per step, median ratios and shares."""
    threads, best = torch.get_num_threads(), limits("cpu")
    spent: dict[str, list[float]] = {name: [] for name in ("ours", *rivals(batch))}
    shares, bandwidths = [], []
    for length in torch.linspace(4, TOKENS - 5, places).long().tolist():
        before = native.read_bandwidth(2**28, threads, 3)
        spent["ours"].append(our_step(engine, batch, length))
        bandwidths.append(max(before, native.read_bandwidth(2**28, threads, 3)) / 1e9)
        for name, rival in rivals(batch).items():
            spent[name].append(rival_step(rival, batch, length))
        floor = limit_of_step(engine, dtype, batch, length, best | {"gb_per_s": bandwidths[-1]})
        shares.append((max(floor.values()) / spent["ours"][-1], max(floor, key=floor.get)))
    ratio = {
        name: statistics.median(theirs / mine for theirs, mine in zip(spent[name], spent["ours"], strict=True))
        for name in rivals(batch)
    }
    return {
        "step_seconds": {name: statistics.mean(seconds) for name, seconds in spent.items()},
        "ratio": ratio,
        "share_of_limit": statistics.median(share for share, _ in shares),
        "limited_by": statistics.mode(by for _, by in shares),
        "gb_per_s": bandwidths,
    }


@pytest.mark.quick(batch=1)
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_decode(benchmark, quick, dtype, batch):
    engine = GPTEngine(small_gpt(), dtype)
    engine.reserve(batch, TOKENS)
    validate(engine, dtype, batch)
    sequences = torch.zeros(batch, TOKENS + 1, dtype=torch.int64)
    steps = range(1, TOKENS + 1)
    found = compare(engine, dtype, batch, QUICK_PLACES if quick else PLACES)
    rounds = 1 if quick else ROUNDS
    benchmark.pedantic(lambda: engine.decode(request(sequences, steps)), warmup_rounds=rounds > 1, rounds=rounds)
    found["tokens_per_second"] = batch * TOKENS / benchmark.stats.stats.median
    benchmark.extra_info |= found
    ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in found["ratio"].items())
    share = f"{100 * found['share_of_limit']:.0f} % of the limit ({found['limited_by']})"
    low, high = min(found["gb_per_s"]), max(found["gb_per_s"])
    print(f"\n  {found['tokens_per_second']:.0f} tokens/s; {ratios}; {share}; memory at {low:.0f} to {high:.0f} GB/s")
