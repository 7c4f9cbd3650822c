"""What this machine offers: devices, the extension, Triton, why one is missing, and facts to print with measurements.

Importing this module imports neither torch nor Triton; each function imports what it inspects.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypedDict

from tamingfast.errors import SettingError, UserError

if TYPE_CHECKING:
    import torch

OLDEST_CUDA = (8, 0)  # lowest compute capability that the CUDA engine is compiled for
_OLDEST_CAPABILITY = (8, 0)  # for the Triton kernels: bfloat16 on the matrix units
_OLDEST_TRITON = (3, 4)  # 3.3 fails to compile the attention, 3.2 to interpret the quantizer


@dataclass(frozen=True)
class Availability:
    """Whether something can run on this machine; the reason describes what was found, or why it cannot."""

    available: bool
    reason: str


class Facts(TypedDict):
    """What a measurement depends on; the GPU in words, or why there is none."""

    python: str
    platform: str
    torch: str
    cpu: str
    cpu_features: list[str]
    cpu_count: int | None
    threads: int
    gpu: str


@functools.cache
def gpu() -> Availability:
    """Whether torch can use a GPU; the reason is its name, or why there is none."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return Availability(False, f"no GPU: torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return Availability(False, f"no GPU: torch {torch.__version__} is built for one but finds none")
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Availability(True, f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {memory:.0f} GiB)")


@functools.cache
def triton() -> Availability:
    """Whether the Triton kernels can run, on a GPU or in the interpreter."""
    import torch

    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return Availability(False, f"triton cannot be imported ({error})")
    if interpreted():
        return Availability(True, f"triton {version}, interpreted on the CPU because TRITON_INTERPRET is set")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST_TRITON:
        return Availability(
            False, f"triton {version}, but its kernels need {dotted(_OLDEST_TRITON)} (torch 2.8) or newer"
        )
    device = gpu()
    if device.available and torch.version.hip is not None:
        return Availability(False, f"triton {version}, but its kernels are written for CUDA devices, and this is ROCm")
    if device.available and torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        needed = f"its kernels need compute capability {dotted(_OLDEST_CAPABILITY)}"
        return Availability(False, f"triton {version}, but {needed}: {device.reason}")
    return Availability(device.available, f"triton {version}, {device.reason}")


@functools.cache
def cudnn() -> Availability:
    """Whether torch can use cuDNN's attention."""
    import torch

    device = gpu()
    if not device.available or torch.version.cuda is None:
        return Availability(False, device.reason)
    return Availability(torch.backends.cudnn.is_available(), f"cuDNN {torch.backends.cudnn.version()}")


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors in Triton's interpreter, which tests use (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The extension module ``tamingfast._C`` and how it was built, or None and why it is missing."""
    try:
        module = importlib.import_module("tamingfast._C")
    except ImportError as error:
        return None, _why_no_native(error)
    info = module.build_info()
    openmp = "with" if info["openmp"] else "without"
    return module, f"{info['compiler']}, C++{info['cxx_standard']}, {openmp} OpenMP, {' '.join(info['isas'])}"


def extension() -> Availability:
    """Whether the extension can run; the reason is that of :func:`native`."""
    module, reason = native()
    return Availability(module is not None, reason)


# Without these options pip takes what is installed or what it has built already.
_AGAIN = "repeat the installation with 'pip install -v --force-reinstall --no-deps --no-cache-dir'"


def _why_no_native(error: ImportError) -> str:
    package = Path(__file__).parents[1]
    if any(package.glob("_C.*.so")) or any(package.glob("_C.*.pyd")):
        return f"tamingfast._C was built but does not load: {error}"
    note = package / "_C.failure.txt"
    if note.exists():
        reason = note.read_text(encoding="utf-8", errors="replace").strip()
        return f"the build of tamingfast._C failed ({reason}); install a C++17 compiler and {_AGAIN}"
    return f"tamingfast._C was not built ({error}); {_AGAIN} to see why"


def isa() -> str:
    """The instruction set for native kernels from ``TAMINGFAST_ISA``; ``auto``, the default, is the best available.

    RuntimeError if this processor or this build lacks it, or if there is no extension.
    """
    name = os.environ.get("TAMINGFAST_ISA") or "auto"
    if name == "auto":
        return name
    module, reason = native()
    if module is None:
        raise SettingError(f"TAMINGFAST_ISA: got {name!r}, expected auto, as there are no native kernels ({reason})")
    supported = module.build_info()["isas"]
    if name not in supported:
        raise SettingError(f"TAMINGFAST_ISA: got {name!r}, expected auto or one of {', '.join(supported)}")
    return name


@functools.cache
def cuda() -> Availability:
    """Whether the CUDA engine can run; the reason names its compiler and the GPU, or what is missing."""
    module, reason = native()
    if module is None:
        return Availability(False, reason)
    info = module.build_info()
    if info["cuda"] is None:
        return Availability(False, f"built without CUDA ({info['no_cuda']})")
    count, reason = module.cuda.devices()
    device = gpu()
    if count == 0 and device.available:
        reason = f"torch runs on the GPU, but kernels built by {info['cuda']} do not ({reason})"
        advice = "update the driver, or install tamingfast again with CUDA_HOME naming an older toolkit"
        return Availability(False, f"{reason}: {advice}")
    if count == 0:
        return Availability(False, f"no CUDA device ({reason}); built by {info['cuda']}")
    return Availability(device.available, f"{device.reason}; built by {info['cuda']}")


# Instruction sets that the kernels use or could use; a processor lists a hundred others.
_FEATURES = re.compile(
    r"\b(avx|avx2|fma|f16c|avx512(?:f|bw|dq|vl|_vnni|_bf16|_fp16)|avx_vnni|amx_\w+|asimd\w*|sve\w*|i8mm|bf16)\b"
)
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
# Those with which torch trains faster than in float32. Vector units for bfloat16 multiply twice as fast, but what
# surrounds each layer costs more than that: measured were 1.1 to 1.3 times the time in float32 with avx512_bf16, and
# 0.5 to 0.9 times with amx_bf16.
_FASTER = {"amx_bf16"}


def _cpu() -> tuple[str, list[str]]:
    """The processor's name, and its instruction sets; none where the system does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        name.group(1).strip() if name else platform.processor() or platform.machine(),
        sorted(set(_FEATURES.findall(flags.group(1)))) if flags else [],
    )


def trains_faster_in_bfloat16(device: torch.device) -> bool:
    """Whether torch trains faster under autocast to bfloat16 than in float32: on GPUs and CPUs with matrix units."""
    return multiplies_bfloat16(device) and (device.type != "cpu" or not _FASTER.isdisjoint(_cpu()[1]))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16; without them it is slower than float32, on a CPU several times."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not _BFLOAT16.isdisjoint(_cpu()[1])


def processors() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts() -> Facts:
    """Versions, processor with its vector instructions, threads and GPU: print them beside any measurement."""
    import torch

    name, features = _cpu()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpu": name,
        "cpu_features": features,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu().reason,
    }


_UNTOLD = 2 << 30  # bytes taken to be free where the system does not tell


def available_memory(device: torch.device) -> int:
    """Bytes that are free on the device now; where the system does not tell, half of all memory or a cautious guess."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # MemAvailable includes the file cache that Linux would give back.
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    for pages, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # macOS knows only the second, Windows neither
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") // share
    return _UNTOLD


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; None picks a GPU if torch finds one, else the CPU.

    UserError if torch does not know the name or cannot use the device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # its message lists every device type of torch
        raise UserError(f"device: got {name!r}, expected cpu, cuda or cuda:N") from error
    check_precision(device)
    try:
        torch.zeros(1, dtype=torch.float64, device=device).cpu()  # meta, for one, makes tensors but holds no values
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(
            f"device: got {name!r}, expected a device that works here ({reason}); see `tamingfast info`"
        ) from error
    return device


def check_precision(device: torch.device) -> None:
    """Raise UserError for a device on which no token can be chosen as everywhere else."""
    if device.type == "mps":
        raise UserError(
            "device: got 'mps', expected one with float64, in which tokens are chosen and which Apple's GPUs lack; use "
            "the CPU, for which there is an engine"
        )


def dotted(version: tuple[int, int]) -> str:
    """A version or compute capability as text: 3.4."""
    return ".".join(map(str, version))
