"""What this machine can run, and the one place where a user overrides what runs.

Every op has up to three implementations: ``triton`` (GPU), ``native`` (the extension ``tamingfast._C``) and
``reference`` (plain torch). :mod:`tamingfast.ops` chooses among them by device and dtype; a user chooses with
the environment variable ``TAMINGFAST_BACKEND`` (read once, at import) or ``with backends.use("reference"):``.
``TAMINGFAST_ISA`` names the instruction set of the native kernels (``generic``, ``avx2``, ``avx512``,
``avx512bf16``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tamingfast.errors import UserError

logger = logging.getLogger("tamingfast")

# Which ops each backend has; a kernel is made known by its name here and a branch in ops.py.
KERNELS: dict[str, tuple[str, ...]] = {
    "triton": ("causal_attention", "group_norm_silu", "nearest_code", "quantize"),
    "native": ("nearest_code", "quantize"),
    "reference": ("causal_attention", "group_norm_silu", "nearest_code", "quantize"),
}

_OLDEST_CAPABILITY = (8, 0)  # bfloat16 on the matrix units
_OLDEST_TRITON = (3, 4)  # 3.3 fails to compile the attention, 3.2 to interpret the quantizer
OLDEST_CUDA = (8, 0)  # that the CUDA engine's kernels are compiled for

_requested = os.environ.get("TAMINGFAST_BACKEND") or None


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine, and why, or why not."""

    available: bool
    reason: str


def requested() -> str | None:
    """The backend that the user asked for, None for the automatic choice. RuntimeError when there is none such."""
    if _requested is not None and _requested not in KERNELS:
        raise RuntimeError(f"TAMINGFAST_BACKEND: got {_requested!r}, expected one of {', '.join(KERNELS)}")
    return _requested


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Run every op inside the block on ``backend`` (triton, native or reference), or raise; None: choose freely.

    The choice holds for the whole process, other threads included. ValueError for an unknown name; an op that the
    backend cannot run raises RuntimeError with the reason when it is called.
    """
    global _requested
    if backend is not None and backend not in KERNELS:
        raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(KERNELS)}")
    before, _requested = _requested, backend
    try:
        yield
    finally:
        _requested = before


def isa() -> str:
    """The instruction set that native kernels are asked to use; ``auto`` is the best of this processor."""
    name = os.environ.get("TAMINGFAST_ISA") or "auto"
    module, _ = native()
    if name == "auto" or module is None:
        return name
    supported = module.build_info()["isas"]
    if name not in supported:
        raise RuntimeError(f"TAMINGFAST_ISA: got {name!r}, expected auto or what runs here: {', '.join(supported)}")
    return name


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The extension module ``tamingfast._C`` and how it was built, or None and the reason for its absence."""
    try:
        module = importlib.import_module("tamingfast._C")
    except ImportError as error:
        return None, _why_no_native(error)
    info = module.build_info()
    openmp = "with" if info["openmp"] else "without"
    return module, f"{info['compiler']}, C++{info['cxx_standard']}, {openmp} OpenMP, {' '.join(info['isas'])}"


def _why_no_native(error: ImportError) -> str:
    here = Path(__file__).parents[1]
    if any(here.glob("_C.*.so")) or any(here.glob("_C.*.pyd")):
        return f"tamingfast._C was built but does not load: {error}"
    note = here / "_C.failure.txt"
    if note.exists():
        reason = note.read_text(encoding="utf-8").strip()
        return f"the build of tamingfast._C failed ({reason}); install a C++17 compiler and install tamingfast again"
    return f"tamingfast._C was not built ({error}); install tamingfast again with `pip install -v` to see why"


@functools.cache
def _triton() -> Availability:
    import torch

    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return Availability(False, f"triton cannot be imported ({error})")
    if interpreted():
        return Availability(True, f"triton {version}, interpreted on the CPU because TRITON_INTERPRET is set")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return Availability(False, f"triton {version}, but its kernels need {oldest} (torch 2.8) or newer")
    device = gpu()
    if device.available and torch.version.hip is not None:
        return Availability(False, f"triton {version}, but its kernels are written for CUDA devices, and this is ROCm")
    if device.available and torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        oldest = ".".join(map(str, _OLDEST_CAPABILITY))
        return Availability(
            False, f"triton {version}, but its kernels need compute capability {oldest}: {device.reason}"
        )
    return Availability(device.available, f"triton {version}, {device.reason}")


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, for tests: on CPU tensors and only when asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def gpu() -> Availability:
    """Whether torch can run on a GPU: its name, or the reason why not."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return Availability(False, f"no GPU: torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return Availability(False, f"no GPU: torch {torch.__version__} is built for one but finds none")
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Availability(True, f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {memory:.0f} GiB)")


def _native() -> Availability:
    module, reason = native()
    return Availability(module is not None, reason)


@functools.cache
def cuda() -> Availability:
    """Whether the CUDA engine can run: what its kernels were built for and on what they run, or the reason why not."""
    module, reason = native()
    if module is None:
        return Availability(False, reason)
    info = module.build_info()
    if info["cuda"] is None:
        return Availability(False, f"built without CUDA ({info['no_cuda']})")
    count, reason = module.cuda.devices()
    if count == 0 and gpu().available:
        reason = f"torch runs on the GPU, but what {info['cuda']} built does not ({reason})"
        advice = "update the driver, or install tamingfast again with CUDA_HOME naming an older toolkit"
        return Availability(False, f"{reason}: {advice}")
    if count == 0:
        return Availability(False, f"no CUDA device ({reason}); built by {info['cuda']}")
    device = gpu()
    return Availability(device.available, f"{device.reason}; built by {info['cuda']}")


_PROBES = {"triton": _triton, "native": _native, "reference": lambda: Availability(True, "plain torch")}


def status() -> dict[str, Availability]:
    """Of each backend, by name: whether it can run here, and why or why not."""
    return {name: _PROBES[name]() for name in KERNELS}


def refusal(backend: str, op: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on this machine, None when it can."""
    if op not in KERNELS[backend]:
        return f"it has no kernel for {op}"
    state = _PROBES[backend]()
    return None if state.available else state.reason


@functools.cache
def log_fallback(op: str, backend: str, reason: str) -> None:
    """Say once for each reason that ``op`` runs on the torch reference instead of ``backend``."""
    logger.warning("%s runs on the torch reference, not on the %s backend: %s", op, backend, reason)


# What the kernels use or will be asked about; the full list of flags is hundreds of words long.
_FEATURES = re.compile(
    r"\b(avx|avx2|fma|f16c|avx512(?:f|bw|dq|vl|_vnni|_bf16|_fp16)|avx_vnni|amx_\w+|asimd\w*|sve\w*|i8mm|bf16)\b"
)


def machine() -> dict[str, Any]:
    """Facts to print beside any measurement: versions, processor, its vector instructions, threads, GPU."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpu": name.group(1).strip() if name else platform.processor() or platform.machine(),
        "cpu_features": sorted(set(_FEATURES.findall(flags.group(1)))) if flags else [],
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu().reason,
    }


def available_memory(device: Any) -> int:
    """Bytes that are free on a `torch.device` now."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Linux also counts what it would give back of its file cache.
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe() -> str:
    """The text of ``tamingfast info``: the machine, each backend with its reason, and the overrides in force."""
    facts = machine()
    lines = [
        f"python     {facts['python']} on {facts['platform']}",
        f"torch      {facts['torch']}, threads: {facts['threads']}, processors: {facts['cpu_count']}",
        f"cpu        {facts['cpu']} ({' '.join(facts['cpu_features']) or 'no known vector instructions'})",
        f"gpu        {facts['gpu']}",
    ]
    for name, state in status().items():
        ops = f" [{', '.join(KERNELS[name])}]" if state.available else ""
        lines.append(f"{name:<10} {'yes' if state.available else 'no'}: {state.reason}{ops}")
    engine = cuda()
    lines.append(f"{'cuda':<10} {'yes' if engine.available else 'no'}: {engine.reason}")
    for variable in ("TAMINGFAST_BACKEND", "TAMINGFAST_ISA"):
        lines.append(f"{variable} = {os.environ.get(variable) or 'not set, chosen by device and dtype'}")
    return "\n".join(lines)


def pick_device(name: str | None = None) -> Any:
    """The `torch.device` of that name, a GPU if None and there is one; UserError where it cannot be used here."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # which names all devices of torch
        raise UserError(f"got device '{name}'; expected cpu, cuda or cuda:N") from error
    try:
        torch.zeros(1, device=device).cpu()  # meta, for one, makes tensors but holds nothing
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"device '{name}' cannot be used here ({reason}); see `tamingfast info`") from error
    return device
