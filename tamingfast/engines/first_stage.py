"""Chooses what runs an encoder or a decoder: the CPU engine, or torch, whole or in bands of rows."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tamingfast.engines import bands
from tamingfast.engines.cpu_first_stage import FirstStageEngine
from tamingfast.engines.cpu_maps import LANES
from tamingfast.engines.feature_maps import BAND_MAPS, FeatureMaps, shape_of
from tamingfast.engines.layers import (
    Attention,
    Convolution,
    Downsample,
    Layer,
    LayeredNetwork,
    Norm,
    Residual,
    Whole,
    shapes,
    undescribed,
)
from tamingfast.engines.lending import Snapshot
from tamingfast.errors import UserError
from tamingfast.ops import backends

#: "native": the CPU engine; "torch": torch's own operations; "auto": the engine where it can run.
ENGINES = ("auto", "native", "torch")
#: Types in which torch can decode faster than in that of the weights, where the device has units for them.
LOW = (torch.bfloat16, torch.float16)
#: What "auto" means in this thread; see `using`.
_preferred: ContextVar[str] = ContextVar("first stage engine", default="auto")

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], object]


@contextlib.contextmanager
def using(engine: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Iterator[None]:
    """Inside the block, in this thread, ``engine`` runs the networks for which no other engine than "auto" is named.

    With ``dtype``, one of `LOW`, torch runs them on that type of device, under its autocast to this type. Where
    gradients are enabled torch runs them in any case. Raises UserError for an unknown name or type, and for "native"
    with a type.
    """
    check_name(engine)
    if dtype is not None and dtype not in LOW:
        raise UserError(f"dtype: got {dtype!r}, expected {' or '.join(map(str, LOW))}, or None for that of the weights")
    if dtype is not None and engine == "native":
        raise UserError(f"engine: got 'native' beside {dtype}, expected 'torch' or 'auto'; leave the type out")
    engine = "torch" if dtype is not None else engine
    before = _preferred.set(engine if engine != "auto" else _preferred.get())
    try:
        with torch.autocast(device, dtype) if dtype is not None else contextlib.nullcontext():
            yield
    finally:
        _preferred.reset(before)


def beside(sampler: str) -> str:
    """The engine of first stages where ``sampler``, an engine of `tamingfast.sampling.sample_grid`, draws the tokens.

    Torch's own operations if only these were asked for. "native" asks for a prior's engine, which GPUs have too.
    """
    return "torch" if sampler in ("torch", "naive") else "auto"


def check_name(engine: object) -> None:
    """Raise UserError unless this is one of `ENGINES`."""
    if engine not in ENGINES:
        raise UserError(f"engine: got {engine!r}, expected one of {', '.join(ENGINES)}")


def forward(network: nn.Module, x: Tensor) -> Tensor:
    """``network(x)``, by the engine if it can run and no gradient can be asked for.

    With gradients enabled, in training mode, under autocast, and while torch's operations are compiled, traced,
    transformed or watched, it is torch's own, and so it is for networks that a program has changed.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or torch.is_grad_enabled() or _observed():
        return network(x)
    if not describes(network):
        return network(x)
    return _run(network, x) if _runs(network, x, "auto") else network(x)


def describes(network: nn.Module) -> TypeGuard[LayeredNetwork]:
    """Whether a network describes its layers; what does not is run by torch, whole, which is logged once."""
    if isinstance(network, LayeredNetwork):
        return True
    _logged(f"a {type(network).__name__} does not describe its layers")
    return False


def _observed() -> bool:
    """Whether torch's operations do more than compute in float32: are traced, transformed, counted or autocast."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or bool(_get_current_dispatch_mode_stack())
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


@torch.no_grad()
def run(
    network: LayeredNetwork,
    x: Tensor,
    memory: int | None = None,
    progress: Progress | None = None,
    engine: str = "auto",
) -> Tensor:
    """``network(x)``: several images at a time if memory allows, in bands if not even one fits.

    Args:
        network: an encoder or a decoder.
        x: (B, C, H, W).
        memory: bytes for feature maps and the result, weights not counted. Default: half of the free memory. Where an
            image goes in bands for want of it, the engine keeps no packed copy of the weights but that of the layer
            that runs; the result has the same bits.
        progress: called as progress(done, total) in multiply-adds over all images, after each layer or band.
        engine: one of `ENGINES`; "auto" gives way to `using`.

    Raises:
        UserError: ``memory`` is too small for bands, or the disk for the feature maps that exceed it, or ``engine`` is
            "native" and cannot run.
    """
    run = _run if _runs(network, x, engine) else bands.run
    return run(network, x, memory, progress)


def _run(network: LayeredNetwork, x: Tensor, memory: int | None = None, progress: Progress | None = None) -> Tensor:
    memory = backends.available_memory(x.device) // 2 if memory is None else memory
    engine = FirstStageEngine(network, keep=False)
    result = 4 * engine.result(shape_of(x))
    at_once = min(len(x), memory // (engine.peak(shape_of(x)) + result))
    engine = engine_for(network, keep=at_once > 0)
    work = engine.work(shape_of(x))
    total, done = sum(work) * len(x), 0.0

    def advance(images: int, layer: int, part: float) -> None:
        nonlocal done
        done += work[layer] * part * images
        if progress is not None:
            progress(min(round(done), total), total)

    if at_once:
        parts = [engine(part, advance=functools.partial(advance, len(part))) for part in x.split(at_once)]
    else:
        parts = []
        for image in x.split(1):
            store = FeatureMaps(memory, result, engine.band(shape_of(x)) // (BAND_MAPS // 4), x)
            parts.append(engine(image, store, functools.partial(advance, 1)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _runs(network: LayeredNetwork, x: Tensor, engine: str) -> bool:
    """Whether the CPU engine runs the network on ``x``, and not torch."""
    check_name(engine)
    engine = _preferred.get() if engine == "auto" else engine
    if engine == "torch" or (engine == "auto" and backends.requested() not in (None, "native")):
        return False
    reason = refusal(network, x)
    if reason is not None and engine == "native":
        raise UserError(f"engine: got 'native', which cannot run here ({reason}), expected one that can; use 'auto'")
    return reason is None


def refusal(network: LayeredNetwork, x: Tensor) -> str | None:
    """Why the engine cannot run this network on images like ``x``, or None when it can."""
    module, reason = backends.native()
    if module is None:
        return reason
    if not isinstance(network, nn.Module) or not isinstance(network, LayeredNetwork):
        return "the network does not describe its layers"
    refused = undescribed(network) or next(filter(None, map(_layer_refusal, network.layers())), None)
    if refused is not None:
        return _logged(refused)
    sides = shapes(network.layers(), shape_of(x)) if x.ndim == 4 else [(0, 0, 0)]
    if not x.numel() or min(map(min, sides)) < 1 or x.shape[1] != network.layers()[0].convolutions[0].in_channels:
        return f"it runs images of the network's channels, and these are {tuple(x.shape)}"  # torch says what is wrong
    if any(module.training for module in network.modules()):
        return "the network is in training mode"
    for value in (x, *_weights(network)):
        if value.device.type != "cpu":
            return f"it runs on the CPU, and a tensor is on {value.device}"
        if value.dtype != torch.float32 or value.layout != torch.strided:
            return _logged(f"it runs dense float32 tensors, and one is {value.layout} {value.dtype}")
        if type(value) not in (Tensor, nn.Parameter):
            return _logged(f"it runs plain tensors, and one is a {type(value).__name__}")
    return None


def _weights(network: LayeredNetwork) -> list[Tensor]:
    """All that the engine reads of the network: parameters, or what stands in their place."""
    layers = network.layers()
    modules: list[nn.Conv2d | Norm] = [conv for layer in layers for conv in layer.convolutions]
    modules += [norm for layer in layers for norm in _norms(layer)]
    return [value for module in modules for value in (module.weight, module.bias) if value is not None]


def _layer_refusal(layer: Layer) -> str | None:
    if isinstance(layer, Whole):
        return f"it has no {type(layer.module).__name__} with a shortcut of its own branch"
    stride = 2 if isinstance(layer, Downsample) else 1
    for conv in layer.convolutions:
        reach = conv.kernel_size[0] // 2 if stride == 1 else 0
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.groups == 1
        fits = conv.kernel_size in ((1, 1), (3, 3)) and conv.stride == (stride, stride) and conv.dilation == (1, 1)
        if not plain or not fits or conv.padding != (reach, reach):
            return f"it has no {conv}"
        if conv.weight.shape != (conv.out_channels, conv.in_channels, *conv.kernel_size):
            return f"the weights of {conv} are {tuple(conv.weight.shape)}"
    for norm in _norms(layer):
        if norm.weight is None or norm.bias is None:
            return "a norm has no weights"
        if len(norm.weight) % LANES:
            return f"it normalises multiples of {LANES} channels, and a norm has {len(norm.weight)}"
    return None


def _norms(layer: Layer) -> tuple[Norm, ...]:
    if isinstance(layer, Residual):
        return layer.norm1, layer.norm2
    if isinstance(layer, Attention):
        return (layer.norm,)
    return (layer.norm,) if isinstance(layer, Convolution) and layer.norm is not None else ()


@functools.cache
def _logged(reason: str) -> str:
    """The reason, which is logged once: where the engine could be expected, its absence costs time."""
    logger.warning("An encoder or decoder runs in torch instead of the CPU engine: %s.", reason)
    return reason


def engine_for(network: LayeredNetwork, keep: bool = True) -> FirstStageEngine:
    """The engine of this network; it is kept, and its weights are packed again only after they have changed.

    Without ``keep`` an engine that is not there already is made without packed weights, for one call.
    Threads may call it side by side: one packs, the others wait. The weights must not change meanwhile.
    """
    assert isinstance(network, nn.Module)
    state = Snapshot(_weights(network))
    modules = tuple(map(id, network.modules()))
    with _packing:
        known = _kept.get(network)
        if known is not None and known.modules == modules and known.state == state:
            return known.engine
        known = None
        _kept.pop(network, None)  # both references, before its successor needs the memory
        engine = FirstStageEngine(network, keep)
        if keep:
            _kept[network] = _Kept(modules, state, engine)
    return engine


@dataclass(frozen=True)
class _Kept:
    """An engine, and the modules, which it keeps alive, and weights of its network when the engine was made."""

    modules: tuple[int, ...]
    state: Snapshot
    engine: FirstStageEngine


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_packing = threading.Lock()


def _unlocked() -> None:
    global _packing
    _packing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlocked)  # a child has none of the threads that may hold it
