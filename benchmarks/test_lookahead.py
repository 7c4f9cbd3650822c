"""Lookahead on the CPU: what rows cost, and how much faster decoding is for it.

The tokens of the CPU engine are those of decoding one after the other, which is asserted for every image that is timed.
How many a pass chooses depends on how well tokens can be guessed, hence on the prior: `TAMINGFAST_BENCH_PRIOR` names
run directories or checkpoints of unconditional or class-conditional priors, of latent tokens or of pixels, separated by
colons, by default the model of the package. "random weights" is a prior whose tokens can hardly be guessed: that shows
what lookahead costs where it does not pay. docs/make_lookahead.py counts tokens per pass without timing anything.

TAMINGFAST_BENCH_TINY=1 runs everything in seconds, with tiny networks. TAMINGFAST_ISA=avx2 measures that path.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tamingfast import tasks
from tamingfast.checkpoints import load_model
from tamingfast.engines import DecodeRequest, GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.ops.choice import Choice
from tamingfast.sampling import sample_grid

TINY = os.environ.get("TAMINGFAST_BENCH_TINY") == "1"
PRIORS = [
    path for path in os.environ.get("TAMINGFAST_BENCH_PRIOR", "random weights" if TINY else "demo").split(":") if path
]
WIDTHS = (2, 4) if TINY else (2, 4, 8, 16, 32)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32)
#: Images that are compared in torch, and rounds that are timed.
IMAGES, ROUNDS = (2, 1) if TINY else (16, 5)

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)


@dataclass(frozen=True)
class Prior:
    """A transformer, the conditions of images to draw, and the side of their grids."""

    gpt: GPT
    cond: Tensor
    side: int

    def sequences(self, first: int, batch: int) -> Tensor:
        cond = self.cond[torch.arange(first, first + batch) % len(self.cond)]
        return torch.cat((cond, torch.zeros(batch, self.side**2, dtype=torch.int64)), 1)

    def engine(self, dtype: str, batch: int, drafts: bool = False) -> GPTEngine:
        engine = GPTEngine(self.gpt, dtype, drafts=drafts)
        engine.reserve(batch, self.cond.shape[1] + self.side**2 - 1)
        return engine

    def decode(self, engine: GPTEngine, first: int, batch: int, lookahead: int | None, **choice) -> Tensor:
        """Tokens of images ``first`` onwards, decoded side by side."""
        sequences, given = self.sequences(first, batch), self.cond.shape[1]
        places = [divmod(i, self.side) for i in range(self.side**2)]
        vocab = self.gpt.config.vocab_size
        choice["top_k"] = min(choice.get("top_k", 100) or vocab, vocab)
        engine.decode(
            DecodeRequest(
                slots=range(batch), sequences=sequences, steps=range(given, sequences.shape[1]),
                rows=[row for row, _ in places], columns=[column for _, column in places],
                images=range(first, first + batch), choice=Choice(**choice), lookahead=lookahead,
            )
        )  # fmt: skip
        return sequences


@functools.cache
def prior(name: str) -> Prior:
    if name == "random weights":
        torch.manual_seed(0)
        size = dict(n_layer=2, n_head=2, n_embd=32) if TINY else dict(n_layer=6, n_head=8, n_embd=192)
        side = 6 if TINY else 16
        return Prior(GPT(1024, side**2, **size).eval(), torch.arange(10)[:, None], side)
    model = load_model(name)
    cond = tasks.conditions(model, 10)
    side = math.isqrt(model.transformer.block_size - cond.shape[1] + 1)
    return Prior(model.transformer, cond, side)


def passes(engine: GPTEngine, draw) -> tuple[Tensor, float]:
    """What ``draw()`` returns, and the tokens per pass and sequence that it took."""
    before = engine.info()
    drawn = draw()
    after = engine.info()
    return drawn, (after["tokens"] - before["tokens"]) / (after["passes"] - before["passes"]) / len(drawn)


@pytest.mark.quick(dtype="int8")
@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_rows(benchmark, dtype):
    """A pass of the GPT2-small geometry over 1 to 32 tokens of one sequence, after 128 tokens."""
    size = dict(n_layer=2, n_head=2, n_embd=32) if TINY else dict(n_layer=12, n_head=16, n_embd=768)
    engine = GPTEngine(GPT(1024, 256, **size).eval(), dtype)
    engine.reserve(1, 256)
    engine.step([(0, 0, [0] * 128)], "none")

    def seconds(rows: int) -> float:
        begun = time.perf_counter()
        engine.step([(0, 128, [0] * rows)], "all")
        return time.perf_counter() - begun

    seconds(32)
    spent = {rows: [] for rows in ROWS}
    for _, rows in itertools.product(range(4 * ROUNDS), ROWS):  # in turn, so that other load affects all alike
        spent[rows].append(seconds(rows))
    milliseconds = {rows: statistics.median(values) * 1e3 for rows, values in spent.items()}
    benchmark.pedantic(lambda: seconds(8), rounds=ROUNDS)
    kind = "float32" if dtype == "float32" else "bfloat16"  # int8 weights multiply as bfloat16
    rate = native.arithmetic_rate(kind, torch.get_num_threads(), isa=backends.isa())
    weights = engine.info()["weight_bytes"] / {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    of_rate = 2 * weights * ROWS[-1] / (milliseconds[ROWS[-1]] / 1e3) / rate
    benchmark.extra_info |= {
        "milliseconds": milliseconds,
        "of_arithmetic_at_32_rows": of_rate,
        "times_one_row": {rows: value / milliseconds[1] for rows, value in milliseconds.items()},
        "isa": backends.isa(),
    }
    print("\n  " + ", ".join(f"{rows}: {value:.2f} ms" for rows, value in milliseconds.items()))
    print(f"  {ROWS[-1]} rows at {of_rate:.0%} of the arithmetic rate")


@pytest.mark.parametrize("batch", [1, 2] if TINY else [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
@pytest.mark.parametrize("name", PRIORS)
def test_decode(benchmark, name, dtype, batch):
    """Automatic lookahead, each width, and int8 drafts beside `lookahead=1`; the same images in turn."""
    model = prior(name)
    engine, drafting = model.engine(dtype, batch), model.engine(dtype, batch, drafts=True)
    ways: dict[str, tuple[GPTEngine, int | None]] = {"1": (engine, 1), "None": (engine, None)}
    ways |= {str(width): (engine, width) for width in WIDTHS}
    if dtype != "int8":
        ways |= {"drafts, None": (drafting, None), "drafts, 9": (drafting, 9)}
    spent: dict[str, list[float]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for one in (engine, drafting):
        model.decode(one, 0, batch, None)  # measures what rows cost
    for turn in range(ROUNDS):
        expected = None
        for way, (one, width) in ways.items():
            draw = functools.partial(model.decode, one, turn * batch, batch, width)
            begun = time.perf_counter()
            tokens, rate = passes(one, draw)
            spent[way].append(time.perf_counter() - begun)
            rates[way].append(rate)
            expected = tokens if expected is None else expected
            assert torch.equal(tokens, expected)
    seconds = {way: statistics.median(values) for way, values in spent.items()}
    ratio = {
        way: statistics.median(one / mine for one, mine in zip(spent["1"], spent[way], strict=True)) for way in ways
    }
    count, bandwidth = model.side**2, native.read_bandwidth(2**24 if TINY else 2**28, torch.get_num_threads())
    limit = count * engine.info()["weight_bytes"] / bandwidth  # of one pass per token
    benchmark.pedantic(lambda: model.decode(engine, 0, batch, None), rounds=1)
    benchmark.extra_info |= {
        "prior": name,
        "isa": backends.isa(),
        "tokens_per_second": {way: batch * count / value for way, value in seconds.items()},
        "tokens_per_pass": {way: statistics.mean(values) for way, values in rates.items()},
        "times_lookahead_1": ratio,
        "draft_bytes": drafting.info()["draft_bytes"],
        "of_one_pass_per_token": {way: limit / value for way, value in seconds.items()},
        "milliseconds_by_rows": dict(zip(ROWS, (1e3 * value for value in engine.pass_seconds(ROWS)), strict=True)),
    }
    print()
    for way in ways:
        print(
            f"  lookahead {way}: {batch * count / seconds[way]:.0f} tokens/s, {ratio[way]:.2f}x, "
            f"{statistics.mean(rates[way]):.2f} tokens per pass, {limit / seconds[way]:.0%} of one pass per token"
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRIORS)
def test_torch(benchmark, name, dtype):
    """How often torch, whose matrix products round by their shape, draws another token with lookahead.

    A token counts until the first difference of its image: after it, all have another context.
    """
    model, spent = prior(name), {}

    def draw(lookahead: int) -> Tensor:
        begun = time.perf_counter()
        cond = model.cond[torch.arange(IMAGES) % len(model.cond)]
        drawn = [
            sample_grid(
                model.gpt, one[None], model.side, model.side, window=model.side, engine="torch", dtype=dtype,
                lookahead=lookahead, first_image=i, top_k=min(100, model.gpt.config.vocab_size),
            )
            for i, one in enumerate(cond)
        ]  # fmt: skip
        spent[lookahead] = time.perf_counter() - begun
        return torch.cat(drawn).flatten(1)

    alike = (draw(8) == draw(1)).long().cumprod(1)
    differ = int((alike[:, -1] == 0).sum())
    benchmark.pedantic(lambda: draw(8), rounds=1)
    benchmark.extra_info |= {
        "prior": name, "images": IMAGES, "images_that_differ": differ, "tokens_alike": int(alike.sum()),
        "seconds": {str(lookahead): seconds for lookahead, seconds in spent.items()},
    }  # fmt: skip
    print(
        f"\n  {differ} of {IMAGES} images differ, after {int(alike.sum())} equal tokens in all; "
        f"{spent[1] / spent[8]:.2f}x with lookahead 8"
    )
