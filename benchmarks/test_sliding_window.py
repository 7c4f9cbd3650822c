"""Sampling with a sliding window: the original's loop against each schedule.

64 x 64 tokens, 256 conditioning tokens in every window, GPT2-small geometry. The original passes the whole window, 511
tokens, for every token, with attention spelled out. The time of such a pass does not depend on the tokens, so it is
measured at spaced positions and multiplied by their number. `strided` and `block` run to the end. `paper` and `scene`
pass hundreds of tokens per token, which is what their time goes into: they are stopped after `SECONDS`, and the rest is
integrated by tokens passed, unless TAMINGFAST_BENCH_WHOLE=1 lets them run to the end too.
"""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch

from tamingfast import backends
from tamingfast.models.gpt import GPT
from tamingfast.sampling import make_schedule, make_waves, sample_grid, sampler
from tamingfast.sampling.schedule import RULES

HEIGHT = WIDTH = 64
WINDOW = 16
PREFIX = WINDOW * WINDOW
GEOMETRY = dict(n_layer=12, n_head=16, n_embd=768)
VOCABULARY = 1024
#: Calls of the original's pass, and seconds after which paper and scene are stopped.
PASSES, SECONDS = 5, 40.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(VOCABULARY, 2 * PREFIX, **GEOMETRY).eval()


@pytest.fixture(scope="module")
def condition() -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def original_seconds(gpt: GPT, condition: torch.Tensor) -> float:
    """Seconds for the grid: one whole window for each token, its crop included."""
    device = next(gpt.parameters()).device
    canvas, times = torch.zeros_like(condition).to(device), []
    condition = condition.to(device)
    for k in range(PASSES + 1):
        top = left = k * (HEIGHT - WINDOW) // PASSES
        begun = time.perf_counter()
        crops = [grid[:, top : top + WINDOW, left : left + WINDOW].flatten(1) for grid in (condition, canvas)]
        with backends.use("reference"):
            logits, _ = gpt(torch.cat(crops, 1)[:, :-1])
        canvas[:, top, left] = logits[:, PREFIX].argmax(-1)
        canvas[0, top, left].item()  # waits for the device
        times.append(time.perf_counter() - begun)
    times = sorted(times[1:])
    return times[len(times) // 2] * HEIGHT * WIDTH


def schedule_seconds(gpt: GPT, condition: torch.Tensor, rule: str) -> tuple[float, float]:
    """Seconds for the grid, and the share of it, in tokens sampled, that was really timed."""
    whole = rule in ("strided", "block") or os.environ.get("TAMINGFAST_BENCH_WHOLE") == "1"
    begun, done = time.perf_counter(), 0

    def observe(tokens: torch.Tensor, pending: torch.Tensor) -> None:
        nonlocal done
        done = HEIGHT * WIDTH - int(pending.sum())
        if not whole and time.perf_counter() - begun > SECONDS:
            raise Stopped

    with contextlib.suppress(Stopped):
        sample_grid(gpt, condition, HEIGHT, WIDTH, window=WINDOW, schedule=rule, seed=0, observer=observe)
    spent = time.perf_counter() - begun
    return spent * work(rule)[-1] / work(rule)[done], done / (HEIGHT * WIDTH)


def work(rule: str) -> list[int]:
    """Tokens that have passed through the transformer once so many are sampled."""
    waves = make_waves(make_schedule(HEIGHT, WIDTH, WINDOW, rule), slots(rule))
    fed = torch.from_numpy((waves.steps - waves.fed) + (waves.fed < 0) * (PREFIX - 1))
    return [0, *fed.cumsum(0).tolist()]


def slots(rule: str) -> int:
    gpt = GPT(8, 2 * PREFIX, **GEOMETRY).to("meta")
    waves = sampler.plan_waves(gpt, make_schedule(HEIGHT, WIDTH, WINDOW, rule), 1, PREFIX)
    return int(waves.slots.max()) + 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("device", DEVICES)
def test_sliding_window(benchmark, gpt, condition, rule, device):
    gpt = gpt.to(device)
    original = original_seconds(gpt, condition)
    waves = make_waves(make_schedule(HEIGHT, WIDTH, WINDOW, rule), slots(rule))
    seconds, share = benchmark.pedantic(lambda: schedule_seconds(gpt, condition, rule), rounds=1)
    benchmark.extra_info |= {
        "seconds": seconds,
        "share_timed": share,
        "original_seconds": original,
        "ratio_to_original": original / seconds,
        "waves": len(waves),
        "cache_slots": slots(rule),
        "tokens_computed_per_token": waves.tokens_fed(PREFIX) / (HEIGHT * WIDTH),
        "original_tokens_computed_per_token": 2 * PREFIX - 1,
    }
    computed = waves.tokens_fed(PREFIX) / (HEIGHT * WIDTH)
    print(
        f"\n  {rule} on {device}: {seconds:.1f} s ({share:.0%} of it timed), the original's loop {original:.0f} s: "
        f"{original / seconds:.1f}x; {len(waves)} waves, {computed:.1f} tokens computed per token against "
        f"{2 * PREFIX - 1}, {slots(rule)} cache slots"
    )
