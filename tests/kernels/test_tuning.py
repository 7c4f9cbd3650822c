"""Tuning: a configuration is measured once per key and stored, never while a graph is captured; it can be restored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from tamingfast.kernels import choices, common
from triton.runtime.errors import OutOfResources, PTXASError

CONFIGS = tuple(triton.Config({"BM": size}) for size in (16, 32, 64))
TIMES = {16: 3.0, 32: 1.0, 64: 2.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The block sizes in the order in which they were timed, on a pretended machine."""
    sizes: list[int] = []

    def milliseconds(kernel, grid, config, arguments) -> float:
        sizes.append(config.kwargs["BM"])
        return TIMES[config.kwargs["BM"]]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(common, "_milliseconds", milliseconds)
    monkeypatch.setattr(common, "_names", {})
    monkeypatch.setattr(choices, "_table", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "device A")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return sizes


class Kernel:
    __name__ = "kernel"

    def __init__(self, source: str):
        self.cache_key = source


FIRST, CHANGED = Kernel("source 1"), Kernel("source 2")


def choose(key: tuple, kernel: Kernel = FIRST) -> int:
    return common._choose(kernel, None, CONFIGS, key, {}).kwargs["BM"]


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a new process does not know."""
    monkeypatch.setattr(common, "_names", {})
    monkeypatch.setattr(choices, "_table", {})


def test_the_fastest_is_found_once_for_each_key(measured):
    assert [choose(("a",)) for _ in range(3)] == [32] * 3
    assert measured == [16, 32, 64]
    choose(("b",))
    assert measured == [16, 32, 64] * 2


def test_the_choice_outlives_the_process_but_not_its_kernel_or_device(measured, monkeypatch):
    choose(("a",))
    restart(monkeypatch)
    monkeypatch.setitem(TIMES, 32, 9.0)  # a new measurement would choose otherwise
    assert choose(("a",)) == 32
    assert len(measured) == 3
    choose(("a",), CHANGED)
    assert len(measured) == 6
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "device B")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    choose(("a",))
    assert len(measured) == 9


def test_while_a_graph_is_captured_an_unknown_key_takes_the_first_and_a_known_one_its_choice(measured, monkeypatch):
    choose(("known",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(("known",)) == 32
    assert choose(("unknown",)) == 16
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(("unknown",)) == 32, "a choice made without a measurement must not be kept"


def test_a_restored_choice_counts_more_than_the_disk_and_than_this_process(measured, monkeypatch):
    """As a run resumes: what it first chose holds, though the cache was lost and another would be faster now."""
    choose(("a",))
    kept = choices.made()
    assert list(kept.values()) == [1]
    restart(monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ["TRITON_CACHE_DIR"] + "/lost")
    monkeypatch.setitem(TIMES, 32, 9.0)
    assert choose(("a",)) == 64  # before the state is read, a resumed run looks at its first image
    choices.adopt(kept)
    assert [choose(("a",)) for _ in range(2)] == [32] * 2
    assert choices.made() == kept
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(("a",)) == 32


def test_a_restored_choice_holds_for_the_same_kernel_key_and_device_only(measured, monkeypatch):
    monkeypatch.setitem(TIMES, 16, 0.1)
    choose(("a",))
    kept = choices.made()
    restart(monkeypatch)
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ["TRITON_CACHE_DIR"] + "/lost")
    monkeypatch.setitem(TIMES, 16, 9.0)
    choices.adopt(kept)
    assert (choose(("a",)), choose(("b",)), choose(("a",), CHANGED)) == (16, 32, 32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "device B")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose(("a",)) == 32


def test_a_restored_choice_that_no_configuration_has_is_made_anew(measured):
    choose(("a",))
    choices.adopt(dict.fromkeys(choices.made(), 3))
    assert choose(("a",)) == 32


def test_without_tuning_every_launch_takes_its_first_configuration(measured, monkeypatch):
    choose(("tuned before",))
    monkeypatch.setattr(choices, "TUNED", False)
    assert [choose((name,)) for name in ("tuned before", "another")] == [16, 16]
    assert len(measured) == 3
    assert set(choices.made().values()) == {0}, "the run that is resumed with tuning must go on with them"


@pytest.mark.parametrize(("value", "tuned"), [("0", False), ("1", True), (None, True)])
def test_the_environment_says_whether_to_tune(value, tuned):
    environment = {name: text for name, text in os.environ.items() if name != "TAMINGFAST_TUNE"}
    environment |= {} if value is None else {"TAMINGFAST_TUNE": value}
    code = (
        "import sys; from tamingfast.kernels import choices; assert 'triton' not in sys.modules; print(choices.TUNED)"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tuned)


LACKS = {
    "torch's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB"),
    "the driver's": RuntimeError("Triton Error [CUDA]: out of memory"),
    "a launch's": RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    "shared memory": OutOfResources(300000, 232448, "shared memory"),
    "registers": PTXASError("too many resources"),
}


@pytest.mark.parametrize("error", LACKS.values(), ids=LACKS.keys())
def test_a_configuration_that_lacks_resources_loses(measured, monkeypatch, error):
    monkeypatch.undo()
    tried = []

    def measure(run, **_):
        tried.append(run)
        if len(tried) == 2:
            raise error
        return 3.0 - len(tried)

    monkeypatch.setattr(common, "do_bench", measure)
    assert [common._milliseconds(FIRST, None, config, {}) for config in CONFIGS] == [2.0, float("inf"), 0.0]


def test_other_errors_are_not_taken_for_a_lack_of_resources(monkeypatch):
    def fails(run, **_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(common, "do_bench", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        common._milliseconds(FIRST, None, CONFIGS[0], {})


def test_without_memory_to_measure_in_the_first_runs_and_nothing_is_stored(measured, monkeypatch):
    monkeypatch.setattr(common, "_milliseconds", lambda *_: float("inf"))
    assert choose(("a",)) == 16
    assert not list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.json"))
    restart(monkeypatch)
    monkeypatch.setattr(common, "_milliseconds", lambda kernel, grid, config, arguments: TIMES[config.kwargs["BM"]])
    assert choose(("a",)) == 32
