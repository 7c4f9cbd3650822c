"""Compile what a launcher would launch, for a GPU that need not be there, and read the binary's resources."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# CUDA C++ Programming Guide, table of technical specifications: shared memory of one block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: registers of a thread, bytes of local memory of a thread, shared bytes of a block."""

    name: str
    config: str
    capability: int
    registers: int
    local: int  # spilled registers live here, and arrays that are indexed at run time
    shared: int
    sass: str

    def __str__(self) -> str:
        return f"{self.name} [{self.config}]: {self.registers} registers, {self.local} B local, {self.shared} B shared"

    def uses(self, instruction: str) -> bool:
        return instruction in self.sass


def compile_launches(call: Callable[[], Any], capability: int, module: Any, sass: bool = False) -> list[Binary]:
    """Run ``call`` with every launch of ``module`` replaced by the compilation of all its configurations."""
    binaries: list[Binary] = []

    def record(kernel, grid, configs, key, arguments) -> None:
        for config in configs:
            assert min(grid(config.kwargs)) > 0
            binaries.append(_compile(kernel, config, arguments, capability, sass))

    with mock.patch.object(module, "launch", record):
        call()
    return binaries


def _compile(kernel: Any, config: triton.Config, arguments: dict[str, Any], capability: int, sass: bool) -> Binary:
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
    registers, local, code = _resources(compiled.asm["cubin"], sass)
    text = ", ".join(f"{k}={v}" for k, v in config.kwargs.items())
    label = f"{text}, {config.num_warps} warps, {config.num_stages} stages"
    return Binary(kernel.__name__, label, capability, registers, local, compiled.metadata.shared, code)


def _specialise(value: Any, constexpr: bool) -> tuple[str, Any, bool]:
    """Type, value and divisibility by 16 of an argument, as Triton's own launcher would take it."""
    if constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], None, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1:
        return "constexpr", 1, False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, value % 16 == 0


def _resources(cubin: bytes, sass: bool) -> tuple[int, int, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", path], text=True)
        code = subprocess.check_output([CUOBJDUMP, "--dump-sass", path], text=True) if sass else ""
    number = {name: int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")}
    return number["REG"], number["STACK"] + number["LOCAL"], code
