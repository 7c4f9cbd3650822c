"""Builds csrc/cuda for the CPU, as a Python module, so that kernels are tested on machines without a GPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tamingfast.ops import backends

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "cuda_on_host"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
# The address sanitizer does not know the stacks of fibers, so it checks the heap and globals only.
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param", "asan-stack=0"]

#: On the CPU, with a block's threads in either order to reveal missing barriers, and on a GPU.
PLACES = ["host", "host, threads reversed", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _sources() -> list[Path]:
    return [*KERNELS, ROOT / "csrc" / "cuda" / "bindings.cpp", *sorted(SHIM.glob("*.cpp"))]


def _identity(command: list[str]) -> str:
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), *SHIM.glob("*.h")]
    digest = hashlib.sha256(repr((command, sys.version)).encode())
    for path in sorted([*headers, *_sources()]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(extra: list[str]) -> Path:
    """The module's file, rebuilt when a source or flag changes. Skips the test if there is no compiler."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    includes = [pybind11.get_include(), sysconfig.get_path("include"), SHIM, ROOT / "csrc"]
    command = [*compiler.split(), *FLAGS, *extra, *(f"-I{path}" for path in includes)]
    folder = ROOT / "build" / f"cuda_on_host-{_identity(command)}"
    target = folder / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects = [Path(work, f"{path.name}.o") for path in _sources()]
        for source, made in zip(_sources(), objects, strict=True):
            subprocess.run([*command, "-x", "c++", "-c", source, "-o", made], check=True)
        linked = Path(work, "linked.so")
        subprocess.run([*command, "-shared", *objects, "-o", linked], check=True)
        linked.replace(target)
    return target


@functools.cache
def module() -> ModuleType:
    """The functions of `tamingfast._C.cuda`, running on the CPU."""
    built = os.environ.get("TAMINGFAST_SANITIZED") or build([])  # set by test_kernels_under_sanitizers
    spec = importlib.util.spec_from_file_location("cuda_on_host", built)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


class Kernels:
    """Calls the functions of a kernel module: tensors become addresses, None becomes the null pointer."""

    def __init__(self, module, device: str) -> None:
        self.module, self.device = module, device

    def __getattr__(self, name: str):
        def call(**arguments):
            cuda = self.device == "cuda"
            place = dict(device=0, stream=torch.cuda.current_stream().cuda_stream if cuda else 0)
            values = {
                key: 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value
                for key, value in (place | arguments).items()
            }
            assert all(v.device.type == self.device for v in arguments.values() if isinstance(v, Tensor))
            return getattr(self.module, name)(**values)

        return call

    def options(self, **values) -> Tensor:
        return torch.frombuffer(bytearray(self.module.options_bytes(**values)), dtype=torch.uint8).to(self.device)


@contextlib.contextmanager
def kernels_at(place: str) -> Iterator[Kernels]:
    """The kernels at one of `PLACES`; inside the block, new tensors are made there too."""
    if place == "cuda":
        torch.set_default_device("cuda")
        try:
            yield Kernels(backends.native()[0].cuda, "cuda")
        finally:
            torch.set_default_device(None)
        return
    host = module()
    host.set_reversed(place != "host")
    try:
        yield Kernels(host, "cpu")
    finally:
        host.set_reversed(False)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)
