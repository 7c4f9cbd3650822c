"""The description of the machine, and the sentences that say why something is missing."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from tamingfast.engines.selection import choose_engine
from tamingfast.errors import UserError
from tamingfast.ops import backends, info, machine


def test_devices_by_name():
    assert backends.pick_device("cpu") == torch.device("cpu")
    assert backends.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("warp", "cuda:x", ""):
        with pytest.raises(UserError, match=f"^device: got '{wrong}', expected cpu, cuda or cuda:N$"):
            backends.pick_device(wrong)
    for wrong in ("cuda:77", "meta", "ipu"):
        with pytest.raises(
            UserError, match=rf"^device: got '{wrong}', expected a device that works here \(.+\); see"
        ) as caught:
            backends.pick_device(wrong)
        assert len(str(caught.value)) < 200


def test_a_device_without_float64_is_refused():
    """By name, and where a program has moved a model there itself."""
    parameter = SimpleNamespace(device=torch.device("mps", 0), dtype=torch.float32, is_cuda=False)
    moved = SimpleNamespace(parameters=lambda: iter([parameter]))
    for refused in (lambda: backends.pick_device("mps"), lambda: choose_engine("auto", moved, None)):
        with pytest.raises(
            UserError, match=r"^device: got 'mps', expected one with float64, in which tokens are chosen"
        ):
            refused()


def test_facts_for_reports():
    facts = backends.machine()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu"]
    text = info.describe()
    assert all(name in text for name in backends.PROBES)


def test_a_driver_too_old_for_the_extension_alone_is_named(monkeypatch):
    kernels = type("Kernels", (), dict(devices=lambda: (0, "CUDA driver version is insufficient")))
    module = type("Module", (), dict(build_info=lambda: dict(cuda="nvcc 13.0 for sm_90", no_cuda=""), cuda=kernels))
    monkeypatch.setattr(machine, "native", lambda: (module, "here"))
    monkeypatch.setattr(machine, "gpu", lambda: machine.Availability(False, "no GPU"))
    assert machine.cuda.__wrapped__().reason.startswith("no CUDA device (CUDA driver version is insufficient)")
    monkeypatch.setattr(machine, "gpu", lambda: machine.Availability(True, "a GPU"))
    state = machine.cuda.__wrapped__()
    assert not state.available
    assert state.reason == (
        "torch runs on the GPU, but kernels built by nvcc 13.0 for sm_90 do not (CUDA driver version is insufficient): "
        "update the driver, or install tamingfast again with CUDA_HOME naming an older toolkit"
    )


def test_free_memory_is_told_or_guessed_on_every_system(monkeypatch, tmp_path):
    device, pages = torch.device("cpu"), {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    assert 0 < machine.available_memory(device) < 1 << 50

    def elsewhere(*_, **__):
        raise FileNotFoundError("/proc/meminfo")

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr("builtins.open", elsewhere)
    monkeypatch.setattr(os, "sysconf", sysconf)
    assert machine.available_memory(device) == 500 * 4096  # macOS
    pages["SC_AVPHYS_PAGES"] = 300
    assert machine.available_memory(device) == 300 * 4096
    monkeypatch.delattr(os, "sysconf")
    assert machine.available_memory(device) == 2 << 30  # Windows


def test_a_triton_too_old_for_the_kernels_is_named(monkeypatch):
    monkeypatch.setattr(machine, "interpreted", lambda: False)
    monkeypatch.setattr(machine.importlib, "import_module", lambda name: type("Triton", (), {"__version__": "3.3.1"}))
    state = machine.triton.__wrapped__()
    assert not state.available
    assert state.reason == "triton 3.3.1, but its kernels need 3.4 (torch 2.8) or newer"
