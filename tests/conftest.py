"""Shared by all tests: seeds, the skip of what needs a GPU, and one run of every experiment."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tamingfast import cli
from tamingfast.ops import backends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    device = backends.gpu()
    if not device.available:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=device.reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Global generators start alike for every test, so that a test alone and in the suite does the same."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the libraries under test may use the legacy generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``tamingfast reproduce all --preset smoke`` makes, once for all tests that look at an experiment."""
    out = tmp_path_factory.mktemp("reproduce") / "all"
    small = ["pixels.timing.repeats=1", "pixels.timing.prefixes=3", "orderings.data.length=48"]
    small += ["multiscale.data.length=48", "multiscale.sampling.images=3"]
    assert cli.main(["reproduce", "all", "--preset", "smoke", "--out", str(out), *small]) == 0
    return out


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(0)
