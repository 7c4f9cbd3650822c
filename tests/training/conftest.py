"""Runs that several test modules train on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of a first stage, which no test changes."""
    return tiny.train("vqgan", tmp_path_factory.mktemp("first") / "run", steps=2)
