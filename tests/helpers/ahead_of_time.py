"""Compiles the kernels of a launcher for a GPU that need not be present, and reads the resources they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# CUDA C++ Programming Guide, table of technical specifications: shared memory of one block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: registers and bytes of local memory per thread, bytes of shared memory per block."""

    name: str
    config: str
    capability: int
    registers: int
    local: int  # spilled registers, and arrays that are indexed at run time
    shared: int
    cubin: bytes = field(repr=False)
    products: int  # instructions for products on warp groups that the compiler was given

    def __str__(self) -> str:
        return f"{self.name} [{self.config}]: {self.registers} registers, {self.local} B local, {self.shared} B shared"

    def uses(self, instruction: str) -> bool:
        """Whether the machine code contains the instruction."""
        return instruction in _dump(self.cubin, "--dump-sass")

    def products_kept(self) -> int:
        """How many of these the machine code has, without those that multiply nothing and only mark a group."""
        return len(re.findall(r"HGMMA\S* R\d", _dump(self.cubin, "--dump-sass")))


def compile_launches(call: Callable[[], object], capability: int, module: ModuleType) -> list[Binary]:
    """Run ``call``; each launch through ``module`` compiles all the kernel's configurations instead of launching it."""
    binaries: list[Binary] = []

    def record(kernel, grid, configs, key, arguments) -> None:
        for config in configs:
            assert min(grid(config.kwargs)) > 0
            binaries.append(_compile(kernel, config, arguments, capability))

    with mock.patch.object(module, "launch", record):
        call()
    return binaries


def _compile(
    kernel: triton.JITFunction, config: triton.Config, arguments: dict[str, object], capability: int
) -> Binary:
    values = arguments | config.kwargs
    constexprs, signature, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        kind, value, divisible = _specialise(values[parameter.name], parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constexprs[parameter.name] = value
        elif divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    cubin = compiled.asm["cubin"]
    registers, local = _resources(cubin)
    text = ", ".join(f"{k}={v}" for k, v in config.kwargs.items())
    label = f"{text}, {config.num_warps} warps, {config.num_stages} stages"
    return Binary(
        kernel.__name__, label, capability, registers, local, compiled.metadata.shared, cubin,
        compiled.asm["ptx"].count("wgmma.mma_async"),
    )  # fmt: skip


def _specialise(value: object, constexpr: bool) -> tuple[str, object, bool]:
    """Type, value and divisibility by 16 of an argument, as Triton's own launcher would derive them."""
    if constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], None, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1:
        return "constexpr", 1, False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, value % 16 == 0


def _resources(cubin: bytes) -> tuple[int, int]:
    usage = _dump(cubin, "--dump-resource-usage")
    number = {name: int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")}
    return number["REG"], number["STACK"] + number["LOCAL"]


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([CUOBJDUMP, option, file.name], text=True)
