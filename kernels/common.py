"""What the kernels share: launching with tuned configurations, and dot products that the interpreter gets right."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources

# Triton decides when a kernel is defined, so the variable counts only at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)

LOG2_E = 1.4426950408889634
_WARM_UP_MS, _MEASURE_MS = 5, 20  # per configuration


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. The interpreter holds bfloat16 as integers and would multiply those."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    configs: Sequence[triton.Config],
    key: tuple[Hashable, ...],
    arguments: dict[str, Any],
) -> None:
    """Launch ``kernel`` on the stream of its tensors with the fastest of ``configs``, found once for each ``key``.

    ``grid`` gets the meta-parameters of the configuration. The kernel must not read what it writes, because tuning runs
    it many times. The choice is kept on disk for each kind of device. While a CUDA graph is captured nothing can be
    timed, so an unknown key then takes the first configuration, which must fit every device that we support. The
    configurations must follow from the key and the device.
    """
    tensor = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    if INTERPRETED:
        _run(kernel, grid, configs[0], arguments)
        return
    with torch.cuda.device(tensor.device):
        config = configs[0] if len(configs) == 1 else _choose(kernel, grid, configs, key, arguments)
        _run(kernel, grid, config, arguments)


def _run(kernel: Any, grid: Callable, config: triton.Config, arguments: dict[str, Any]) -> None:
    size = grid(config.kwargs)
    if min(size) > 0:
        kernel[size](**arguments, **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages)


_choices: dict[tuple, triton.Config] = {}


def _choose(
    kernel: Any, grid: Callable, configs: Sequence[triton.Config], key: tuple, arguments: dict[str, Any]
) -> triton.Config:
    here = (kernel, torch.cuda.current_device(), key)
    if here in _choices:
        return _choices[here]
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    identity = (kernel.cache_key, torch.cuda.get_device_name(), triton.__version__, *map(str, configs), *key)
    cache = get_cache_manager(hashlib.sha256(repr(identity).encode()).hexdigest())
    name = f"{kernel.__name__}.choice.json"
    path = cache.get_file(name)
    if path is not None:
        with open(path, encoding="utf-8") as file:
            best = json.load(file)["best"]
    else:
        times = [_milliseconds(kernel, grid, config, arguments) for config in configs]
        best = min(range(len(configs)), key=times.__getitem__)
        record = {"best": best, "key": repr(key), "milliseconds": dict(zip(map(str, configs), times, strict=True))}
        cache.put(json.dumps(record), name, binary=False)
    _choices[here] = configs[best]
    return configs[best]


def _milliseconds(kernel: Any, grid: Callable, config: triton.Config, arguments: dict[str, Any]) -> float:
    from triton.testing import do_bench

    try:
        return do_bench(
            lambda: _run(kernel, grid, config, arguments), warmup=_WARM_UP_MS, rep=_MEASURE_MS, return_mode="median"
        )
    except OutOfResources:
        return float("inf")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; the interpreter is given a small number to exercise splitting."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter's is the oldest, whose tilings are the smallest."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def float32_precision() -> str:
    """The precision of float32 dot products: exact, unless torch's own matrix products may use tf32."""
    matmul = torch.backends.cuda.matmul
    # Where torch has the first, the second raises once anybody has set the first.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
