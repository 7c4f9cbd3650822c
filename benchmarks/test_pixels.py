"""Seconds from the call of `sample_images` to pixels, split into tokens and picture; see `helpers/pixels.py`.

TAMINGFAST_BENCH_TINY=1 runs everything in seconds, with tiny networks.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest
import torch
from pixels import BATCHES, SIDE, measure, model, table

from tamingfast.ops import backends

NATIVE, WHY = backends.native()
TINY = os.environ.get("TAMINGFAST_BENCH_TINY") == "1"
SMALLER = dict(ddconfig=dict(ch=32, ch_mult=(1, 2), attn_resolutions=()), gpt=dict(n_layer=2, n_head=2, n_embd=32))


@pytest.mark.quick
@pytest.mark.skipif(NATIVE is None, reason=WHY)
def test_seconds_to_pixels(benchmark, quick):
    side = 4 if TINY or quick else SIDE
    prior = model(side, **(SMALLER if TINY or quick else {}))
    tokens = torch.arange(side * side).view(1, side, side)
    torch.testing.assert_close(
        prior.decode_grid(tokens, engine="native"), prior.decode_grid(tokens, engine="torch"), rtol=1e-3, atol=1e-3
    )
    found = benchmark.pedantic(lambda: measure(prior, side, BATCHES, 1 if quick else 2, True), rounds=1)
    benchmark.extra_info |= {f"{name}, batch {batch}": asdict(spent) for (name, batch), spent in found.items()}
    print(f"\n{table(found)}")
