"""Sampling with a sliding window: each schedule compared with the original's loop.

64 x 64 tokens (32 x 32 with --quick), 256 conditioning tokens in every window, GPT2-small geometry. For every token the
original passes the whole window, 511 tokens, through the network, with attention written out. The time of such a pass
does not depend on the tokens, so it is measured for a few windows and multiplied by the number of tokens. `strided` and
`block` run to the end. `paper` and `scene` compute hundreds of tokens for each sampled token: they are stopped after
`SECONDS` and extrapolated by the number of computed tokens, unless TAMINGFAST_BENCH_WHOLE=1 lets them run to the end.
"""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch

from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.sampling import make_schedule, sample_grid
from tamingfast.sampling.schedule import Waves
from tamingfast.sampling.waves import plan_waves

SIDE, QUICK_SIDE = 64, 32
WINDOW = 16
PREFIX = WINDOW * WINDOW
GEOMETRY = dict(n_layer=12, n_head=16, n_embd=768)
VOCABULARY = 1024
#: Timed passes of the original, and seconds after which paper and scene are stopped.
PASSES, SECONDS = 5, 40.0
NATIVE = pytest.mark.skipif(backends.native()[0] is None, reason=f"no native engine: {backends.native()[1]}")
#: Schedules and strides; the first two ignore the stride.
CASES = [("paper", 8), ("scene", 8), ("strided", 8), ("strided", 4), ("block", 8)]
WAYS = [
    ("cpu", "torch"),
    pytest.param("cpu", "native", marks=NATIVE),
    pytest.param("cuda", "torch", marks=pytest.mark.gpu),
]


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(VOCABULARY, 2 * PREFIX, **GEOMETRY).eval()


@pytest.fixture(scope="module")
def condition(quick) -> torch.Tensor:
    side = QUICK_SIDE if quick else SIDE
    return torch.randint(VOCABULARY, (1, side, side), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def original_seconds(gpt: GPT, condition: torch.Tensor) -> float:
    """Seconds for the grid: one whole window for each token, including the time to cut it out."""
    device = next(gpt.parameters()).device
    canvas, times = torch.zeros_like(condition).to(device), []
    condition = condition.to(device)
    for k in range(PASSES + 1):
        top = left = k * (condition.shape[1] - WINDOW) // PASSES
        begun = time.perf_counter()
        crops = [grid[:, top : top + WINDOW, left : left + WINDOW].flatten(1) for grid in (condition, canvas)]
        with backends.use("reference"):
            logits, _ = gpt(torch.cat(crops, 1)[:, :-1])
        canvas[:, top, left] = logits[:, PREFIX].argmax(-1)
        canvas[0, top, left].item()  # waits for the device
        times.append(time.perf_counter() - begun)
    times = sorted(times[1:])
    return times[len(times) // 2] * condition.numel()


def schedule_seconds(gpt: GPT, condition: torch.Tensor, rule: str, stride: int, engine: str) -> tuple[float, float]:
    """Seconds for the grid, and the share of its tokens whose sampling was timed."""
    whole = rule in ("strided", "block") or os.environ.get("TAMINGFAST_BENCH_WHOLE") == "1"
    begun, done = time.perf_counter(), 0

    def observe(tokens: torch.Tensor, pending: torch.Tensor) -> None:
        nonlocal done
        done = condition.numel() - int(pending.sum())
        if not whole and time.perf_counter() - begun > SECONDS:
            raise Stopped

    with contextlib.suppress(Stopped):
        sample_grid(
            gpt,
            condition,
            *condition.shape[1:],
            window=WINDOW,
            schedule=rule,
            stride=stride,
            seed=0,
            engine=engine,
            observer=observe,
        )
    spent = time.perf_counter() - begun
    waves = planned(gpt, condition, rule, stride)
    fed = (waves.steps - waves.fed) + (waves.fed < 0) * (PREFIX - 1)
    return spent * fed.sum() / fed[:done].sum(), done / condition.numel()


def planned(gpt: GPT, condition: torch.Tensor, rule: str, stride: int) -> Waves:
    """The waves of `sample_grid`."""
    return plan_waves(gpt, make_schedule(*condition.shape[1:], WINDOW, rule, stride), 1, PREFIX)


@pytest.mark.quick(rule="block", engine="native")
@pytest.mark.parametrize(("rule", "stride"), CASES)
@pytest.mark.parametrize(("device", "engine"), WAYS)
def test_sliding_window(benchmark, gpt, condition, rule, stride, device, engine):
    gpt = gpt.to(device)
    original = original_seconds(gpt, condition)
    waves = planned(gpt, condition, rule, stride)
    computed, slots = waves.tokens_fed(PREFIX) / condition.numel(), int(waves.slots.max()) + 1
    seconds, share = benchmark.pedantic(lambda: schedule_seconds(gpt, condition, rule, stride, engine), rounds=1)
    benchmark.extra_info |= {
        "seconds": seconds,
        "share_timed": share,
        "original_seconds": original,
        "ratio_to_original": original / seconds,
        "waves": len(waves),
        "cache_slots": slots,
        "tokens_computed_per_token": computed,
        "original_tokens_computed_per_token": 2 * PREFIX - 1,
    }
    name = rule if rule in ("paper", "scene") else f"{rule} {stride}"
    print(
        f"\n  {name}, {engine} on {device}: {seconds:.1f} s ({share:.0%} of it timed), the original's loop "
        f"{original:.0f} s: {original / seconds:.1f}x; {len(waves)} waves, {computed:.1f} tokens computed per token "
        f"against {2 * PREFIX - 1}, {slots} cache slots"
    )
