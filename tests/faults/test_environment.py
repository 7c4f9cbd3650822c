"""Environment variables: each value is followed, or refused by name in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tamingfast import cli
from tamingfast.errors import SettingError
from tamingfast.ops import backends, machine

NONSENSE = ["nonsense", " ", "Native", "native ", "0", "1", "native,triton", "None", "\u00e9"]


@pytest.fixture
def environment(monkeypatch):
    """Sets TAMINGFAST_BACKEND, which is read at import, and TAMINGFAST_ISA."""

    def set_to(backend: str = "", isa: str = "") -> None:
        monkeypatch.setattr(backends, "_environment", backend or None)
        monkeypatch.setattr(backends, "_requested", backend or None)
        monkeypatch.setenv("TAMINGFAST_BACKEND", backend)
        monkeypatch.setenv("TAMINGFAST_ISA", isa)

    return set_to


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize(("variable", "option"), [("TAMINGFAST_BACKEND", "backend"), ("TAMINGFAST_ISA", "isa")])
def test_every_command_refuses_what_it_cannot_follow(environment, capsys, tmp_path, variable, option, value):
    if option == "isa" and backends.native()[0] is None:
        pytest.skip("there is no extension")
    environment(**{option: value})
    for command in (["inspect", str(tmp_path)], ["sample", str(tmp_path), "--out", str(tmp_path / "out")]):
        assert cli.main(command) == cli.USAGE_ERROR
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tamingfast: error: {variable}: got {value!r}, expected ")
    assert cli.main(["info"]) == 0
    assert value.strip() in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["yes", "2", " ", "off", "0 "])
def test_tuning_is_on_or_off(monkeypatch, capsys, tmp_path, value):
    monkeypatch.setenv("TAMINGFAST_TUNE", value)
    assert cli.main(["inspect", str(tmp_path)]) == cli.USAGE_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tamingfast: error: TAMINGFAST_TUNE: got {value!r}, expected 1, ")
    for value in ("0", "1", ""):
        monkeypatch.setenv("TAMINGFAST_TUNE", value)
        backends.check_environment()


@pytest.mark.parametrize("value", ["reference", "sdpa", "auto", ""])
def test_what_can_run_is_followed(environment, value):
    environment(**({"isa": "auto"} if value == "auto" else {"backend": value}))
    backends.check_environment()
    assert backends.requested() == (value if value not in ("", "auto") else None)


def test_a_backend_that_cannot_run_here_is_refused_before_any_work(environment, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(backends.PROBES, "triton", lambda: machine.Availability(False, "triton 9.9, no GPU"))
    environment("triton")
    assert cli.main(["inspect", str(tmp_path)]) == cli.USAGE_ERROR
    assert capsys.readouterr().err == (
        "tamingfast: error: TAMINGFAST_BACKEND: got 'triton', which cannot run here (triton 9.9, no GPU), expected one "
        "that can; see `tamingfast info`\n"
    )


def test_an_instruction_set_without_an_extension_is_refused(environment, monkeypatch):
    monkeypatch.setattr(machine, "native", lambda: (None, "it was not built"))
    environment(isa="avx2")
    with pytest.raises(SettingError, match=r"^TAMINGFAST_ISA: got 'avx2', expected auto, as .* \(it was not built\)$"):
        backends.isa()
    environment(isa="")
    assert backends.isa() == "auto"


@pytest.mark.skipif(backends.gpu().available, reason="there is a GPU")
def test_triton_without_a_gpu_as_a_user_asks_for_it(tmp_path):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tamingfast.cli", "sample", str(tmp_path), "--out", str(tmp_path / "out")],
        env=clean | {"TAMINGFAST_BACKEND": "triton"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("tamingfast: error: TAMINGFAST_BACKEND: got 'triton', which cannot run here (")
    assert len(done.stderr.splitlines()) == 1
