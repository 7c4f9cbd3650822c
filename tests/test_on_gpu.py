"""`make gpu` on a machine without one: parts end in time, a part that fails costs no other, nothing is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("on_gpu", ROOT / "benchmarks" / "on_gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SECONDS_TO_END", 0.5)
    return module


def python(on_gpu: ModuleType, name: str, program: str, least: float = 0, most: float = 20, alone: bool = True):
    return on_gpu.Part(name, ("-c", program), least, most, alone)


def test_a_part_that_fails_or_hangs_costs_no_other(on_gpu, tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    parts = [
        python(on_gpu, "hangs", f"{deaf}; print('here', flush=True); time.sleep(60)", most=2, alone=False),
        python(on_gpu, "crashes", "import os; print('before'); os.abort()", alone=False),
        python(on_gpu, "good", "print('after')"),
    ]
    report = on_gpu.Report(tmp_path)
    assert not on_gpu.run(parts, report, time.monotonic() + 60)
    done = json.loads((tmp_path / "parts.json").read_text())
    assert {name: facts["status"] for name, facts in done.items()} == {"hangs": -9, "crashes": -6, "good": 0}
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert {"[hangs] here", "[good] after"} <= set(log)


def test_what_does_not_fit_is_skipped_and_named(on_gpu, tmp_path, capsys):
    parts = [python(on_gpu, "long", "raise SystemExit(1)", least=30), python(on_gpu, "short", "pass", least=1)]
    report = on_gpu.Report(tmp_path)
    assert not on_gpu.run(parts, report, time.monotonic() + 10)
    assert report.done["long"]["status"] is None
    assert report.done["short"]["status"] == 0
    assert "[long] skipped: needs 30 s" in capsys.readouterr().out


def test_parts_that_time_something_run_alone(on_gpu):
    alone = [python(on_gpu, name, "", alone=name.isupper()) for name in ("a", "b", "C", "D", "e", "f")]
    groups = ["".join(part.name for part in group) for group in on_gpu.side_by_side(alone)]
    assert groups == ["ab", "C", "D", "ef"]


def test_a_second_call_goes_on(on_gpu, tmp_path, monkeypatch):
    parts = tuple(python(on_gpu, name, f"print({name!r})") for name in ("first", "second"))
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    monkeypatch.setattr(on_gpu, "prepare", lambda *_: None)
    on_gpu.Report(tmp_path).add("first", status=0, seconds=1)
    assert on_gpu.main([str(tmp_path), "--dry-run"]) == 0
    assert "[first]" not in (tmp_path / "log.txt").read_text()
    assert on_gpu.main([str(tmp_path), "--dry-run", "--part", "first"]) == 0
    assert "[first] first" in (tmp_path / "log.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_worker_whose_device_is_lost_makes_room_for_another():
    """A CUDA error that stays would fail all later tests of the process."""
    program = """
        import torch, conftest
        torch.cuda.is_initialized = lambda: True
        def lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
        torch.cuda.synchronize = lambda: None
        conftest.pytest_runtest_logfinish("one")
        print("goes on", flush=True)
        torch.cuda.synchronize = lost
        conftest.pytest_runtest_logfinish("two")
        print("went on")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTEST_XDIST_WORKER": "gw0", "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{ROOT}/tests/helpers"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "goes on\n"), done.stderr
    assert "two: CUDA error: an illegal memory access" in done.stderr


def test_it_says_what_is_wrong(on_gpu, tmp_path):
    with pytest.raises(SystemExit, match="--part: got 'smok', expected one of smoke, engine"):
        on_gpu.main([str(tmp_path), "--part", "smok"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU: torch finds no CUDA device here"):
            on_gpu.main([str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_every_part_selects_something(on_gpu):
    """Each collects tests that are marked `gpu`; a renamed file or test would leave it empty."""
    pytest.importorskip("pytest_benchmark")
    for part in on_gpu.PARTS:
        words = [word for word in part.arguments if not word.startswith("--durations")]
        at = words.index("-n") if "-n" in words else len(words)
        command = [sys.executable, *words[:at], *words[at + 2 :], "--collect-only", "-q", "-p", "no:xdist"]
        command = [word for word in command if word not in ("--dist", "worksteal")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{part.name}: {done.stdout}{done.stderr}"
