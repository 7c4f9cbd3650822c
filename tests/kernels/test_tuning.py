"""Tuning: a configuration is measured once per key and stored on disk, never while a graph is captured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
from tamingfast.kernels import common

CONFIGS = tuple(triton.Config({"BM": size}) for size in (16, 32, 64))
TIMES = {16: 3.0, 32: 1.0, 64: 2.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The block sizes in the order in which they were timed, on a pretended machine."""
    sizes: list[int] = []

    def milliseconds(kernel, grid, config, arguments) -> float:
        sizes.append(config.kwargs["BM"])
        return TIMES[config.kwargs["BM"]]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(common, "_milliseconds", milliseconds)
    monkeypatch.setattr(common, "_choices", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "device A")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return sizes


class Kernel:
    __name__ = "kernel"

    def __init__(self, source: str):
        self.cache_key = source


FIRST, CHANGED = Kernel("source 1"), Kernel("source 2")


def choose(key: tuple, kernel: Kernel = FIRST) -> int:
    return common._choose(kernel, None, CONFIGS, key, {}).kwargs["BM"]


def test_the_fastest_is_found_once_for_each_key(measured):
    assert [choose(("a",)) for _ in range(3)] == [32] * 3
    assert measured == [16, 32, 64]
    choose(("b",))
    assert measured == [16, 32, 64] * 2


def test_the_choice_outlives_the_process_but_not_its_kernel_or_device(measured, monkeypatch):
    choose(("a",))
    monkeypatch.setattr(common, "_choices", {})  # as a new process starts
    monkeypatch.setitem(TIMES, 32, 9.0)  # a new measurement would choose otherwise
    assert choose(("a",)) == 32
    assert len(measured) == 3
    choose(("a",), CHANGED)
    assert len(measured) == 6
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "device B")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    choose(("a",))
    assert len(measured) == 9


def test_while_a_graph_is_captured_an_unknown_key_takes_the_first_and_a_known_one_its_choice(measured, monkeypatch):
    choose(("known",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(("known",)) == 32
    assert choose(("unknown",)) == 16
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(("unknown",)) == 32, "a choice made without a measurement must not be kept"
