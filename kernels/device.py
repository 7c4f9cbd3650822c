"""Facts of a device that both the kernels and the CUDA engine divide their work by; needs no Triton."""

from __future__ import annotations

import functools

import torch

#: For CPU tensors, in Triton's interpreter and in the CUDA kernels built for the host, so that tests split work too.
_WITHOUT_GPU = 4
_CACHE_WITHOUT_GPU = 2**16


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache of a CUDA device; a small number for a CPU."""
    if device.type != "cuda":
        return _CACHE_WITHOUT_GPU
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; a small number for a CPU."""
    if device.type != "cuda":
        return _WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count
