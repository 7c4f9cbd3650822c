"""The machine code of the CUDA engine's kernels: all are present, stay within their registers and do not spill."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections import defaultdict

import pytest
from ahead_of_time import CUOBJDUMP

from tamingfast.ops import backends, info

if backends.interpreted():
    pytest.skip("these tests have nothing to interpret", allow_module_level=True)

native, reason = backends.native()
built = native is not None and native.build_info()["cuda"] is not None
needs_kernels = pytest.mark.skipif(not built, reason=backends.cuda().reason)
TYPES = ("float", "Bf16", "Half")


@functools.cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """Registers, and bytes of stack and local memory, per thread: by target and kernel with its template arguments."""
    found: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", native.__file__], text=True)
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    target = name = None
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            target = match.group(1)
        elif match := re.search(r"Function .*?(\w+_kernel<.*?>)\(", line):
            name = match.group(1).replace("tamingfast::cuda::", "").replace("(anonymous namespace)::", "")
        elif name is not None and "REG:" in line:
            found[target, name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            name = None
    return found


def test_the_kernels_are_built_wherever_nvcc_is_found():
    """Otherwise a source that nvcc rejects would go unnoticed: the build falls back to no CUDA."""
    if native is None or os.environ.get("TAMINGFAST_CUDA") == "0":
        pytest.skip("the extension, or CUDA, was left out")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    if not (shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))):
        assert native.build_info()["no_cuda"] == "nvcc was not found"
        pytest.skip("nvcc was not found")
    assert native.build_info()["cuda"] is not None, native.build_info()["no_cuda"]


@needs_kernels
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton has no cuobjdump")
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt, which demangles names, was not found")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_fits_and_does_not_spill(target):
    kernels = {name: values for (where, name), values in resources().items() if where == target}
    expected = {f"linear_kernel<{r}, {n}>" for r in (1, 2, 4, 8) for n in ("true", "false")}
    expected |= {f"tiles_kernel<{t}, {n}>" for t in TYPES[1:] for n in ("true", "false")}
    expected |= {f"attention_kernel<{t}, {lanes}>" for t in TYPES for lanes in (8, 16, 32)}
    expected |= {f"{name}_kernel<{t}>" for t in TYPES for name in ("append", "add_norm", "gelu", "choose")}
    assert set(kernels) == expected
    for name, used in sorted(kernels.items()):
        print(f"{target} {name}: {used['REG']} registers")
        assert used["STACK"] == used["LOCAL"] == 0, name
        assert 0 < used["REG"] <= most_registers(name), name


def most_registers(name: str) -> int:
    """The most with which enough blocks share 64 k registers to saturate memory."""
    kernel, rows, *_ = re.split(r"[<,>] ?", name)
    if kernel == "attention_kernel":
        return 96
    if kernel == "tiles_kernel":
        return 80  # three blocks of 256 threads: those of this layer and of the next ones, which load weights meanwhile
    if kernel == "linear_kernel":
        return {"1": 128, "8": 255}.get(rows, 168)
    return 64


@needs_kernels
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton has no cuobjdump")
def test_kernels_load_only_weights_before_they_wait_for_the_previous_kernel():
    """The compiler may move loads: those of a linear layer's weights, and no others, must come before the wait."""
    text = subprocess.check_output([CUOBJDUMP, "-sass", "-arch", "sm_90", native.__file__], text=True)
    kernels = re.split(r"Function : (\S+)", text)[1:]
    assert len(kernels) == 2 * (8 + 4 + 9 + 12)  # names alternate with code
    for name, code in zip(kernels[::2], kernels[1::2], strict=True):
        before, wait, after = code.partition("ACQBULK")
        assert wait, name
        assert before.count("PREEXIT") == bool(re.search("(linear|tiles|attention)_kernel", name)), (
            "weights are read after these"
        )
        assert "PREEXIT" not in after, name
        loads = 0
        if linear := re.search(r"linear_kernelILi(\d)ELb(\d)E", name):
            rows, norm = linear.groups()
            loads = 16 + 4 * int(norm) + 1  # the matrix, gain and shift, the bias
            if (rows, norm) == ("1", "0"):  # inputs of as many steps, and what is added to, before any use
                assert len(re.findall(r"\bLDG\.", after.partition("FFMA")[0])) >= 9, name
        if tiles := re.search(r"tiles_kernelI.*Lb(\d)E", name):
            loads = 1  # the bias
            copies = [len(re.findall(rf"\bLDGSTS\.E\.BYPASS\.{how}128 ", before)) for how in (r"LTC128B\.", "")]
            assert copies == [4, 2 * int(tiles.group(1))], "the matrix; gain and shift"
        assert len(re.findall(r"\bLDG?\.", before)) == loads, name
        assert not re.search(r"\bSTG?\.", before), name


@needs_kernels
@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton has no cuobjdump")
def test_later_devices_have_ptx_to_compile():
    listed = subprocess.check_output([CUOBJDUMP, "--list-ptx", native.__file__], text=True)
    assert "sm_90" in listed


@needs_kernels
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, which lists symbols, was not found")
def test_the_cuda_runtime_is_not_exported():
    """torch may have loaded another runtime; neither may resolve the other's functions by name."""
    symbols = subprocess.check_output(["nm", "-D", native.__file__], text=True)
    assert not re.findall(r"\bcuda[A-Z]\w+|\bcu[A-Z]\w+|__cuda\w+", symbols)


@needs_kernels
def test_without_a_device_the_extension_says_so():
    count, why = native.cuda.devices()
    assert (count == 0) == bool(why)
    if count == 0:
        assert f"no CUDA device ({why})" in info.describe()
