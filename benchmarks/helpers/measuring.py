"""Times and the limits of the machine, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tamingfast.ops import backends


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
