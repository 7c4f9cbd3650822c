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
CSRC = ROOT / "csrc"
SHIM = ROOT / "tests" / "cuda_on_host"
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
PLAIN = ["-O1"]
# The address sanitizer does not know the stacks of fibers, so it checks the heap and globals only.
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "--param", "asan-stack=0"]
BUILD = ROOT / "build" / "cuda_on_host"

#: On the CPU, with threads that run in order or take turns at random, and on a GPU.
PLACES = ["host", "host, at random", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kernels(csrc: Path = CSRC) -> list[Path]:
    """The sources of the kernels."""
    return sorted((csrc / "cuda").glob("*.cu"))


@functools.cache
def _compiler() -> list[str]:
    """The command of the compiler, with what is common to all calls. Skips the test if there is none."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    return [*compiler.split(), *FLAGS, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", f"-I{SHIM}"]


def _made(name: str, command: list[str], inputs: list[Path]) -> Path:
    """The file that ``command`` makes, in build/; made again when the command or an input changes."""
    digest = hashlib.sha256(repr((command, sys.version)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    stem, dot, ending = name.partition(".")
    target = BUILD / f"{stem}-{digest.hexdigest()[:16]}{dot}{ending}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as work:
            subprocess.run([*command, "-o", f"{work}/made"], check=True)
            Path(work, "made").replace(target)
    return target


def compiled(source: Path, flags: list[str], csrc: Path = CSRC) -> Path:
    """The object file of a source, with the headers of ``csrc``."""
    headers = sorted([*csrc.glob("*.h"), *(csrc / "cuda").glob("*.h"), *SHIM.glob("*.h")])
    command = [*_compiler(), *flags, f"-I{csrc}", "-x", "c++", "-c", str(source)]
    return _made(f"{source.name}.o", command, [source, *headers])


def linked(name: str, objects: list[Path], flags: list[str]) -> Path:
    """The program or library; of a function that several objects define, the first one counts."""
    return _made(name, [*_compiler(), *flags, *map(str, objects)], objects)


def build(flags: list[str]) -> Path:
    """The module's file."""
    sources = [*kernels(), CSRC / "cuda" / "bindings.cpp", SHIM / "fibers.cpp", SHIM / "module.cpp"]
    name = f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    return linked(name, [compiled(source, flags) for source in sources], [*flags, "-shared"])


@functools.cache
def module() -> ModuleType:
    """The functions of `tamingfast._C.cuda`, running on the CPU."""
    built = os.environ.get("TAMINGFAST_SANITIZED") or build(PLAIN)  # set by test_kernels_under_sanitizers
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
    if place != "host":
        host.run_at_random(0)
    try:
        yield Kernels(host, "cpu")
    finally:
        host.run_in_order()


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)
