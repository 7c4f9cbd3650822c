"""Shared by all tests: seeds, skipping without a GPU, and one run of all experiments."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import smoke
import torch

from tamingfast import cli
from tamingfast.ops import backends


def pytest_configure(config: pytest.Config) -> None:
    # Also without pytest-xdist, which registers the marker itself.
    config.addinivalue_line("markers", "xdist_group(name): tests that one worker of pytest-xdist runs")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    device = backends.gpu()
    for item in items:
        if not device.available and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=device.reason))
        if "everything" in getattr(item, "fixturenames", ()):
            # Under --dist loadgroup only one worker makes the run, instead of each of them.
            item.add_marker(pytest.mark.xdist_group("reproduce"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Global generators start alike for every test, so that a test alone and in the suite does the same."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the libraries under test may use the legacy generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ``tamingfast reproduce all --preset smoke``, made once per process."""
    out = tmp_path_factory.mktemp("reproduce") / "all"
    smaller = [f"{name}.{setting}" for name, settings in smoke.SMALLER.items() for setting in settings]
    assert cli.main(["reproduce", "all", "--preset", "smoke", "--out", str(out), *smaller]) == 0
    return out


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(0)
