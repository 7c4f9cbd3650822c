"""Shared by the kernels: launches with tuned configurations, and a dot product that also works in the interpreter."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from . import choices

# Triton reads the variable when a kernel is defined, so only its value at import counts.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)

LOG2_E = 1.4426950408889634
_WARM_UP_MS, _MEASURE_MS = 5, 20  # per configuration
_LACKS = ("out of memory", "too many resources requested")  # in the driver's errors, which torch and Triton pass on

#: The grid of a launch, from the meta-parameters of its configuration.
Grid: TypeAlias = Callable[[dict[str, int]], tuple[int, ...]]
#: Tensors and numbers of a launch, by the kernel's parameter names.
Arguments: TypeAlias = Mapping[str, object]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. The interpreter stores bfloat16 as integers and would multiply those."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def launch(
    kernel: triton.JITFunction,
    grid: Grid,
    configs: Sequence[triton.Config],
    key: tuple[Hashable, ...],
    arguments: Arguments,
) -> None:
    """Launch ``kernel`` on the device of its tensors with the fastest of ``configs``, measured once for each ``key``.

    Tuning runs the kernel many times, so it must not read what it writes, unless the configurations have a
    ``pre_hook``: it gets the arguments before every run, and resets what the kernel counts in. The choice is stored on
    disk for each GPU model, and in `choices`. Nothing can be timed while a CUDA graph is captured: an unknown key then
    takes the first configuration, which must fit every supported device. The configurations must be a function of the
    key and the device.
    """
    tensor = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    if INTERPRETED:
        _run(kernel, grid, configs[0], arguments)
        return
    with torch.cuda.device(tensor.device):
        config = configs[0] if len(configs) == 1 else _choose(kernel, grid, configs, key, arguments)
        _run(kernel, grid, config, arguments)


def _run(kernel: triton.JITFunction, grid: Grid, config: triton.Config, arguments: Arguments) -> None:
    size = grid(config.kwargs)
    if min(size) > 0:
        if config.pre_hook is not None:
            config.pre_hook(arguments)
        kernel[size](**arguments, **config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages)


# Names of launches in `choices`, by kernel, device index and key: a digest at every launch would take the host long.
_names: dict[tuple[triton.JITFunction, int, tuple[Hashable, ...]], str] = {}


def _choose(
    kernel: triton.JITFunction,
    grid: Grid,
    configs: Sequence[triton.Config],
    key: tuple[Hashable, ...],
    arguments: Arguments,
) -> triton.Config:
    here = (kernel, torch.cuda.current_device(), key)
    launch = _names.get(here) or _names.setdefault(here, _name(kernel, configs, key))
    best = choices.known(launch, len(configs)) if choices.TUNED else 0
    if best is None:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        best = _fastest(kernel, grid, configs, arguments, launch)
    choices.remember(launch, best)
    return configs[best]


def _name(kernel: triton.JITFunction, configs: Sequence[triton.Config], key: tuple[Hashable, ...]) -> str:
    """The kernel's name and a digest of all that a choice depends on, the model of the GPU included."""
    identity = (kernel.cache_key, torch.cuda.get_device_name(), triton.__version__, *map(str, configs), *key)
    return f"{kernel.__name__} {hashlib.sha256(repr(identity).encode()).hexdigest()}"


def _fastest(
    kernel: triton.JITFunction, grid: Grid, configs: Sequence[triton.Config], arguments: Arguments, launch: str
) -> int:
    """The index of the fastest configuration, from the disk or measured."""
    name, _, digest = launch.rpartition(" ")
    cache, file_name = get_cache_manager(digest), f"{name}.choice.json"
    path = cache.get_file(file_name)
    if path is not None:
        with open(path, encoding="utf-8") as file:
            return int(json.load(file)["best"])
    times = [_milliseconds(kernel, grid, config, arguments) for config in configs]
    best = min(range(len(configs)), key=times.__getitem__)
    if math.isfinite(times[best]):  # else there was no memory to measure in, which need not be so the next time
        record = {"best": best, "milliseconds": dict(zip(map(str, configs), times, strict=True))}
        cache.put(json.dumps(record), file_name, binary=False)
    return best


def _milliseconds(kernel: triton.JITFunction, grid: Grid, config: triton.Config, arguments: Arguments) -> float:
    """Median time of a launch; infinity if the device lacks the resources for it, or the memory to measure it."""
    try:
        return do_bench(
            lambda: _run(kernel, grid, config, arguments), warmup=_WARM_UP_MS, rep=_MEASURE_MS, return_mode="median"
        )
    except (OutOfResources, PTXASError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in _LACKS):
            raise
        return math.inf


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; for the interpreter the oldest supported, which has the smallest tiles."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def narrow_memory(capability: tuple[int, int]) -> bool:
    """Whether a block can have 99 KB of shared memory, as on devices for workstations, instead of 163 KB and more."""
    return capability in ((8, 6), (8, 9)) or capability[0] == 12


def float32_precision() -> str:
    """Precision of float32 dot products: "ieee", or "tf32" where torch's own matrix products may use it."""
    matmul = torch.backends.cuda.matmul
    # torch versions with fp32_precision raise on reading allow_tf32 once fp32_precision has been set.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
