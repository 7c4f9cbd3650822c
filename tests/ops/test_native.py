"""The extension: its functions, threads, instruction sets and memory, and behaviour without it."""

from __future__ import annotations

import os
import re
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python

from tamingfast import ops
from tamingfast.ops import backends, info, machine, reference

native, reason = backends.native()
needs_native = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.build_info()["isas"] if native else []


def array(value: torch.Tensor) -> tuple[int, int]:
    return value.data_ptr(), value.nbytes


def nearest(z: torch.Tensor, codebook: torch.Tensor, threads: int = 1, isa: str = "auto") -> torch.Tensor:
    out = torch.full((len(z),), -7)  # poison: every element must be written
    native.nearest_code(array(z), len(z), array(codebook), len(codebook), z.shape[1], array(out), threads, isa)
    return out


@needs_native
def test_build_info_tells_how_it_was_built():
    info = native.build_info()
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["cxx_standard"] == 17
    assert info["openmp"] in (True, False)
    assert info["isas"][0] == "generic"
    from importlib.metadata import version

    assert info["version"] == version("tamingfast")


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_result_depends_on_neither_threads_nor_instruction_set(rng, isa):
    """Even where rounding decides: half of the codes are copies, shifted by less than the scan can resolve."""
    codebook = torch.randn(300, 19, generator=rng)
    codebook[150:] = codebook[:150] * (1 + 1e-7 * torch.randn(150, 1, generator=rng))
    z = torch.cat([torch.randn(1000, 19, generator=rng), codebook])
    expected = reference.nearest_code(z, codebook)
    for threads in (1, 2, 7, 1000):
        assert torch.equal(nearest(z, codebook, threads, isa), expected)


@needs_native
@pytest.mark.parametrize("n", [1, 5, 95, 96, 97, 193])
@pytest.mark.parametrize("k", [1, 7, 8, 9, 16, 17, 47, 48, 49])
def test_sizes_around_the_tiles(rng, n, k):
    z, codebook = torch.randn(n, 6, generator=rng), torch.randn(k, 6, generator=rng)
    expected = reference.nearest_code(z, codebook)
    for isa in ISAS:
        assert torch.equal(nearest(z, codebook, isa=isa), expected)


@needs_native
def test_neighbouring_memory_is_left_alone(rng):
    z, codebook = torch.randn(101, 5, generator=rng), torch.randn(33, 5, generator=rng)
    out = torch.full((103,), -7)
    native.nearest_code(array(z), 101, array(codebook), 33, 5, array(out[1:-1]), 2)
    assert out[0] == out[-1] == -7
    assert torch.equal(out[1:-1], reference.nearest_code(z, codebook))


BAD_ARGUMENTS = [
    ({"n": -1}, ValueError, "^n: got -1"),
    ({"k": 0}, ValueError, "^k: got 0"),
    ({"d": 0}, ValueError, "^d: got 0"),
    ({"threads": 0}, ValueError, "^threads: got 0"),
    ({"z": (0, 48)}, ValueError, "^z: got a null pointer"),
    ({"codebook": (0, 60)}, ValueError, "^codebook: got a null pointer"),
    ({"out": (0, 32)}, ValueError, "^out: got a null pointer"),
    ({"z": (3, 48)}, ValueError, "^z: got 3, expected an address that is a multiple of 4"),
    ({"out": (12, 32)}, ValueError, "^out: got 12, expected an address that is a multiple of 8"),
    ({"z": (64, 24)}, ValueError, "^z: got 24, expected 48 bytes, 4 x 3 elements of 4"),
    ({"codebook": (64, 120)}, ValueError, "^codebook: got 120, expected 60 bytes"),
    ({"out": (64, 16)}, ValueError, "^out: got 16, expected 32 bytes"),
    ({"out": (64, -32)}, ValueError, "^out: got -32, expected 32 bytes"),
    ({"n": 2**62, "d": 2**20}, ValueError, "^z: got .* elements, expected at most"),
    ({"k": 2**62}, ValueError, "^codebook: got .* elements, expected at most"),
    ({"isa": "z80"}, ValueError, "^isa: got 'z80'"),
    ({"n": 2**63}, TypeError, "incompatible"),
    ({"z": (-1, 48)}, TypeError, "incompatible"),
    ({"z": 64}, TypeError, "incompatible"),
    ({"n": 1.5}, TypeError, "incompatible"),
    ({"codebook": None}, TypeError, "incompatible"),
]


@needs_native
@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:30])
def test_bad_arguments_are_named(change, error, message):
    z, codebook, out = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    good = {"z": array(z), "n": 4, "codebook": array(codebook), "k": 5, "d": 3, "out": array(out)}
    native.nearest_code(**good, threads=1)
    with pytest.raises(error, match=message):
        native.nearest_code(**({"threads": 1} | good | change))


# Small sizes fit the arrays below; all others must be refused before memory is accessed.
size = st.one_of(
    st.integers(-(2**70), 0), st.integers(2**61, 2**70), st.integers(0, 4), st.none(), st.floats(), st.text()
)


@needs_native
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_arguments_crash(data):
    z, codebook, out = torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64)
    arrays = [
        st.tuples(st.sampled_from([t.data_ptr(), 0, t.data_ptr() + 1, -1, 2**64, None, "z"]), st.just(t.nbytes) | size)
        for t in (z, codebook, out)
    ]
    n, k, d = (data.draw(size) for _ in range(3))
    threads = data.draw(st.one_of(st.integers(-(2**40), 2**40), st.none()))
    isa = data.draw(st.one_of(st.sampled_from(["auto", *ISAS]), st.text(), st.integers()))
    at = [data.draw(array) for array in arrays]
    try:
        native.nearest_code(at[0], n, at[1], k, d, at[2], threads, isa)
    except (TypeError, ValueError):
        return
    assert torch.equal(out, torch.zeros(4, dtype=torch.int64))


@needs_native
def test_calls_from_several_python_threads_at_once(rng):
    z, codebook = torch.randn(20000, 64, generator=rng), torch.randn(1024, 64, generator=rng)
    expected = nearest(z, codebook, isa="generic")
    results = {}
    workers = [threading.Thread(target=lambda i=i: results.update({i: nearest(z, codebook, 2)})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(results[i], expected) for i in range(4))


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_use_it():
    """As in a data loader's worker, after the parent has used its threads: OpenMP must not hang."""
    result = run_python(
        """
        import os, torch
        from tamingfast import ops
        torch.set_num_threads(2)
        z, codebook = torch.randn(1000, 8), torch.randn(64, 8)
        before = ops.nearest_code(z, codebook)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(ops.nearest_code(z, codebook), before) else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert result.stdout.strip() == "0", result.stderr


@needs_native
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("backend", "most"), [("native", 32), ("reference", 128)])
def test_memory_does_not_grow_to_n_times_k(backend, most):
    """The N x K matrix would take 256 MiB in float32. The reference works in chunks of 64 MiB; the allocator may or may
    not reuse that of the first call."""
    result = run_python(
        """
        import torch
        from tamingfast import ops
        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
        torch.set_num_threads(1)
        z, codebook = torch.randn(8192, 4), torch.randn(8192, 4)
        ops.nearest_code(z[:2100], codebook)  # what is loaded and allocated once
        before = peak()
        ops.nearest_code(z, codebook)
        print(peak() - before)
        """,
        TAMINGFAST_BACKEND=backend,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < most


@needs_native
def test_instruction_set_from_the_environment(monkeypatch, rng):
    z, codebook = torch.randn(9, 3, generator=rng), torch.randn(8, 3, generator=rng)
    monkeypatch.setenv("TAMINGFAST_ISA", "generic")
    assert backends.isa() == "generic"
    assert torch.equal(ops.nearest_code(z, codebook), reference.nearest_code(z, codebook))
    assert "TAMINGFAST_ISA = generic" in info.describe()
    monkeypatch.setenv("TAMINGFAST_ISA", "mmx")
    with pytest.raises(RuntimeError, match="^TAMINGFAST_ISA: got 'mmx', expected auto or .*generic"):
        ops.nearest_code(z, codebook)


BLOCK = """
    import logging, sys
    for name in {blocked!r}:
        sys.modules[name] = None  # makes `import name` fail
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    import torch
    from tamingfast import ops
    from tamingfast.ops import backends, info
    status = backends.status()
    print({{name: state.available for name, state in status.items()}})
    print(info.describe())
    z, codebook = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([[1.0], [4.0]])
    print(ops.nearest_code(z, codebook).tolist(), ops.nearest_code(z, codebook).tolist())
    """


def test_without_triton_and_extension_the_reference_runs_and_says_why():
    result = run_python(BLOCK.format(blocked=["triton", "tamingfast._C"]))
    assert result.returncode == 0, result.stderr
    assert (
        "{'triton': False, 'native': False, 'sdpa': True, 'flash': True, 'cudnn': False, 'reference': True}"
        in result.stdout
    )
    assert "triton     no: triton cannot be imported" in result.stdout
    assert re.search(r"native     no: .*tamingfast\._C", result.stdout)
    assert "[0, 0, 1] [0, 0, 1]" in result.stdout
    assert result.stdout.count("nearest_code runs on the reference backend instead of native") == 1


def test_an_absent_extension_that_was_asked_for_is_an_error():
    result = run_python(BLOCK.format(blocked=["tamingfast._C"]), TAMINGFAST_BACKEND="native")
    assert result.returncode == 1
    assert re.search(
        r"SettingError: TAMINGFAST_BACKEND: got 'native', which cannot run .*tamingfast\._C", result.stderr
    )


def test_an_unknown_backend_in_the_environment_is_an_error_when_used():
    result = run_python(BLOCK.format(blocked=[]), TAMINGFAST_BACKEND="cpu")
    assert "TAMINGFAST_BACKEND = cpu" in result.stdout
    assert "TAMINGFAST_BACKEND: got 'cpu', expected one of triton, native, sdpa, flash, cudnn, ref" in result.stderr


def test_asking_for_facts_loads_no_torch_on_import():
    result = run_python("import sys; from tamingfast import backends; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_the_reason_of_a_failed_build_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "ops" / "machine.py"))
    error = ImportError("No module named 'tamingfast._C'")
    assert "was not built" in machine._why_no_native(error)
    (tmp_path / "_C.failure.txt").write_text("command 'g++' failed\n")
    assert "(command 'g++' failed); install a C++17 compiler" in machine._why_no_native(error)
    (tmp_path / "_C.cpython-311.so").touch()
    assert "does not load: libgomp" in machine._why_no_native(ImportError("libgomp.so.1: cannot open"))
