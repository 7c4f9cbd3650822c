"""The script of the walk: what its options do to the blocks of the page."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "first_day.py"


@pytest.fixture(scope="module")
def walk():
    specification = importlib.util.spec_from_file_location("first_day", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["first_day"] = module
    specification.loader.exec_module(module)
    return module


def seen(walk, monkeypatch, *words: str) -> list[tuple[str, dict[str, str]]]:
    """(text, environment) of the blocks that the script runs with these options."""
    ran = []
    monkeypatch.setattr(walk, "run", lambda block, directory, environment: ran.append((block.text, environment)))
    monkeypatch.setattr(sys, "argv", ["first_day.py", *words])
    walk.main()
    return ran


def test_offline_forbids_downloads_in_every_block(walk, monkeypatch):
    monkeypatch.delenv("TAMINGFAST_OFFLINE", raising=False)
    everything, offline = seen(walk, monkeypatch), seen(walk, monkeypatch, "--offline")
    assert {environment.get("TAMINGFAST_OFFLINE") for _, environment in everything} == {None}
    assert {environment.get("TAMINGFAST_OFFLINE") for _, environment in offline} == {"1"}
    missing = {text for text, _ in everything} - {text for text, _ in offline}
    assert len(missing) == 1 and "download lpips" in missing.pop()
    assert all(
        environment["PATH"].startswith(str(Path(sys.executable).parent) + os.pathsep) for _, environment in offline
    )


def test_quick_trainings_take_seconds_and_continue_one_another(walk, monkeypatch):
    texts = [text for text, _ in seen(walk, monkeypatch, "--quick")]
    limits = [word for text in texts for word in text.split() if word.startswith("training.seconds=")]
    assert limits == ["training.seconds=2", "training.seconds=4", "training.seconds=6"]
