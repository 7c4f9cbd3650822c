"""The CPU engine of encoders and decoders against torch and, where they are installed, OpenVINO and ONNX Runtime.

What is measured, and how, stands in `helpers/first_stages.py`, which as a program prints the table of all rows.
`TAMINGFAST_BENCH_COMPILE=1` adds torch.compile with freezing.
"""

from __future__ import annotations

import os

import pytest
from first_stages import PAGES, WORKS, describe, measure

from tamingfast.ops import backends

NATIVE, WHY = backends.native()


@pytest.mark.quick(work=WORKS[0], pages="kept pages")
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.title)
@pytest.mark.skipif(NATIVE is None, reason=WHY)
def test_first_stage(benchmark, quick, work, pages):
    compiled = os.environ.get("TAMINGFAST_BENCH_COMPILE") == "1" and work.name == "decode" and work.side == 256
    found = benchmark.pedantic(lambda: measure(work, pages, 1 if quick else None, compiled), rounds=1)
    benchmark.extra_info |= found
    print(f"\n{describe(found)}")
