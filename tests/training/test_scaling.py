"""The bytes of a step are those that two processes exchange, and the table of docs/scale.md follows from the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
import traffic
from forked import on_ranks

from tamingfast.models.gpt import GPT
from tamingfast.training import scaling
from tamingfast.training.scaling import Messages

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def near(found: Messages, expected: Messages) -> None:
    """Assert that the bytes are equal, but for what is smaller than a message that is counted."""
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        ours, theirs = getattr(expected, name), getattr(found, name)
        assert abs(ours - theirs) <= 0.01 * ours, (name, found, expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bytes_of_a_prior(parallel):
    accumulate = 2 if parallel == "fsdp" else 1
    expected = scaling.prior_messages(traffic.prior().transformer, parallel, accumulate)
    for found in on_ranks(2, getattr(traffic, f"of_{parallel}")):
        near(found, expected)
    assert expected.all_reduce if parallel == "ddp" else expected.all_gather > 2 * expected.reduce_scatter


def test_bytes_of_a_first_stage():
    expected = scaling.first_stage_messages(tiny.vqgan_stage().model, accumulate=2)
    for found in on_ranks(2, traffic.of_first_stage):
        near(found, expected)


def test_a_ring_sends_what_each_process_lacks():
    assert Messages(all_reduce=400).sent(1) == 0
    assert Messages(all_reduce=400).sent(4) == 600
    assert Messages(all_gather=400, reduce_scatter=800).sent(4) == 900


def stated(name: str) -> float:
    """A rate that docs/scale.md states, in units of one."""
    (text,) = re.findall(rf"\| `{name}` \| ([0-9.e+-]+) \|", PAGE.read_text())
    return float(text)


def test_the_table_follows_from_the_stated_rates():
    rates = scaling.Rates(*map(stated, ("operations", "within", "between")), int(stated("gpus")), stated("latency"))
    with torch.device("meta"):
        gpt = GPT(1024, 512, 24, 16, 1024)
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.read_text(), re.M)
    assert [int(count) for count, _ in rows] == [2**power for power in range(9)]
    for count, cells in rows:
        expected = []
        for parallel in ("ddp", "fsdp"):
            sent = scaling.prior_messages(gpt, parallel).sent(int(count))
            computing, whole = scaling.prior_step(gpt, 257, 64, int(count), rates, parallel)
            expected += [f"{sent / 1e9:.2f}", f"{1000 * whole:.0f}", f"{100 * computing / whole:.0f} %"]
        assert cells.split(" | ") == expected
