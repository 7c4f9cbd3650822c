"""Backends: who computes an op, what can run here, and the one setting that overrides the automatic choice.

A backend is ``triton`` (the GPU kernels), ``native`` (the extension ``tamingfast._C``), ``sdpa`` (torch's fused
attention, whose kernel torch chooses), ``flash`` or ``cudnn`` (that kernel of torch, with a prefix as two calls) or
``reference`` (the definition in plain torch); each implements some of the ops. By default the choice follows from the
device and dtype of the arguments. To override it, set the environment variable ``TAMINGFAST_BACKEND``, which is read
once at import, or use ``with backends.use("reference"):``. The override applies to the ops that the backend
implements; all others are chosen as usual. ``TAMINGFAST_ISA`` sets the instruction set of the native kernels
(``generic``, ``avx2``, ``avx512``, ``avx512bf16``). With ``TAMINGFAST_TUNE=0`` every Triton kernel takes its first
configuration, instead of measuring once which is fastest.

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from tamingfast.errors import SettingError
from tamingfast.ops import machine as _machine
from tamingfast.ops.machine import (
    OLDEST_CUDA,
    Availability,
    available_memory,
    cuda,
    gpu,
    interpreted,
    isa,
    native,
    pick_device,
)
from tamingfast.ops.machine import facts as machine

__all__ = [
    "OLDEST_CUDA", "PROBES", "Availability", "available_memory", "check_environment", "cuda", "gpu", "interpreted",
    "isa", "machine", "native", "pick_device", "requested", "requested_by", "status", "use",
]  # fmt: skip

#: The backends by name, each with a function that says whether it can run here.
PROBES: dict[str, Callable[[], Availability]] = {
    "triton": _machine.triton,
    "native": _machine.extension,
    "sdpa": lambda: Availability(True, "torch's scaled_dot_product_attention"),
    "flash": lambda: Availability(True, "torch's flash attention; on a CPU, what torch has for the same calls"),
    "cudnn": _machine.cudnn,
    "reference": lambda: Availability(True, "plain torch"),
}

_VARIABLE = "TAMINGFAST_BACKEND"
_environment = os.environ.get(_VARIABLE) or None
_requested = _environment


def requested() -> str | None:
    """The requested backend, or None for the automatic choice. Raises RuntimeError for an unknown name."""
    if _requested is not None and _requested not in PROBES:
        raise SettingError(f"{_VARIABLE}: got {_requested!r}, expected one of {', '.join(PROBES)}, or leave it unset")
    return _requested


def requested_by() -> str:
    """Where the requested backend was named, for messages: the environment variable, or "backend" for `use`."""
    return _VARIABLE if _requested is _environment else "backend"


def check_environment() -> None:
    """Raises SettingError unless what the environment asks for can be followed here."""
    tune = os.environ.get("TAMINGFAST_TUNE") or "1"
    if tune not in ("0", "1"):
        raise SettingError(
            f"TAMINGFAST_TUNE: got {tune!r}, expected 1, to measure what configuration of a kernel is fastest, or 0"
        )
    if _environment is None and not os.environ.get("TAMINGFAST_ISA"):
        return  # without importing torch
    isa()
    name = requested()
    state = None if name is None else PROBES[name]()
    if state is not None and not state.available:
        raise SettingError(
            f"{requested_by()}: got {name!r}, which cannot run here ({state.reason}), expected one that can; see "
            "`tamingfast info`"
        )


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Inside the block, every op that ``backend`` implements runs on it or raises RuntimeError.

    None restores the automatic choice. The setting holds for the whole process, other threads included. Raises
    ValueError for an unknown name.
    """
    global _requested
    if backend is not None and backend not in PROBES:
        raise ValueError(
            f"backend: got {backend!r}, expected one of {', '.join(PROBES)}, or None for the automatic one"
        )
    before, _requested = _requested, backend
    try:
        yield
    finally:
        _requested = before


def status() -> dict[str, Availability]:
    """Whether each backend can run here, and why or why not."""
    return {name: probe() for name, probe in PROBES.items()}
