"""Shared by all benchmarks: facts about the machine, its limits measured in the same run, and fair comparisons.

The recorded JSON contains the machine (``machine_info.tamingfast``) and how fast it reads memory and multiplies, so
that each time can be read as a share of what is physically possible.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import gpu
import pytest
import torch

from tamingfast.ops import backends, info


def pytest_report_header() -> list[str]:
    return info.describe().splitlines()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    device = backends.gpu()
    if not device.available:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=device.reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if path := gpu.write():
        terminalreporter.section("GPU")
        for line in (*gpu.table(), f"written to {path}"):
            terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    devices = ["cpu", "cuda"] if backends.gpu().available else ["cpu"]
    machine_info.pop("node", None)  # the host's name says nothing about the results
    machine_info["tamingfast"] = backends.machine() | {"limits": {device: limits(device) for device in devices}}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one call, including the work on the device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


_limits: dict[str, dict[str, float]] = {}


def limits(device: str) -> dict[str, float]:
    """The best rates of the device measured so far in this run: ``gb_per_s`` and ``<dtype>_gflop_per_s``.

    Every call measures again and keeps the best, because a single measurement may fall into a busy moment. On the CPU
    all of torch's threads read an array larger than any cache, and multiply and add in registers with the extension's
    best instruction set ("bfloat16": with its dot products if it has them). On other devices, and without the
    extension, the limits are those of torch's copy (bytes read plus written) and float32 matrix product.
    """
    module, _ = backends.native()
    tried = _native_limits(module) if device == "cpu" and module is not None else _torch_limits(device)
    seen = _limits.setdefault(device, tried)
    for name, value in tried.items():
        seen[name] = max(seen[name], value)
    return seen


def _native_limits(module: ModuleType) -> dict[str, float]:
    threads = torch.get_num_threads()
    rates = {f"{dtype}_gflop_per_s": module.arithmetic_rate(dtype, threads) / 1e9 for dtype in ("float32", "bfloat16")}
    return {"gb_per_s": module.read_bandwidth(2**28, threads) / 1e9, **rates}


def _torch_limits(device: str) -> dict[str, float]:
    source = torch.ones(2**26, device=device)  # 256 MiB, larger than any cache
    target = torch.empty_like(source)
    side = 2048 if device == "cpu" else 8192
    a = torch.ones(side, side, device=device)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(3))
    product = min(seconds(lambda: a @ a, device) for _ in range(3))
    return {
        "gb_per_s": 2 * source.numel() * source.element_size() / copy / 1e9,
        "float32_gflop_per_s": 2 * side**3 / product / 1e9,
    }


@pytest.fixture
def compare(benchmark) -> Callable[..., None]:
    """Time ``ours`` and ``rivals`` in turn, so that other load on the machine affects all of them equally.

    ``compare(ours, rivals, device, flop, size)``: ``rivals`` maps names to callables, which the caller has run and
    validated; ``flop`` and ``size`` (bytes) are the operations and the memory traffic that the problem requires.
    ``extra_info`` receives the median seconds of each rival, the ratio of the fastest rival to ours, and our share of
    the limit: the larger of size / bandwidth and flop / rate, divided by our time.
    """

    def run(
        ours: Callable[[], Any],
        rivals: dict[str, Callable[[], Any]],
        device: str,
        flop: float,
        size: float,
        rounds: int = 5,
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def between_rounds() -> None:
            for name, rival in rivals.items():
                times[name].append(seconds(rival, device))
            limits(device)

        def timed() -> None:
            ours()
            synchronize(device)

        benchmark.pedantic(timed, setup=between_rounds, rounds=rounds)

        mine = benchmark.stats.stats.median
        medians = {name: statistics.median(measured) for name, measured in times.items()}
        limit = limits(device)
        best = max(size / limit["gb_per_s"], flop / limit["float32_gflop_per_s"]) / 1e9
        benchmark.extra_info |= {
            "rival_seconds": medians,
            "best_rival": min(medians, key=medians.get),
            "ratio_to_best_rival": min(medians.values()) / mine,
            "gflop_per_s": flop / mine / 1e9,
            "share_of_limit": best / mine,
        }
        print(
            f"\n  {mine * 1e3:.1f} ms, {benchmark.extra_info['ratio_to_best_rival']:.2f}x the best of "
            + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in medians.items())
            + f"; {flop / mine / 1e9:.0f} GFLOP/s, {100 * best / mine:.0f} % of the limit"
        )

    return run
