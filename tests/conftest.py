"""Shared by all tests: seeds, skipping without a GPU, and one run of all experiments."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import smoke
import torch
from plain_curves import PLAIN

from tamingfast import cli, report
from tamingfast.ops import backends
from tamingfast.training import plots

# No test downloads, and none depends on what this machine has downloaded before.
os.environ |= {"TAMINGFAST_OFFLINE": "1", "TAMINGFAST_CACHE": os.devnull}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    device = backends.gpu()
    if not device.available:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=device.reason))


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Ends a worker whose device every further call would fail on; another takes its place, with a new context."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file's tests run on one worker, so that its fixtures are made once, and so do files that share costly ones.

    These are the tests of experiments (`everything`) and of conditions (`trained`). The groups of ``--dist loadgroup``
    have no effect in pytest-xdist 3.8 under pytest 9.2. With another ``--dist`` than the default, xdist schedules.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling  # optional package

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shared = (group for group in ("tests/reproduce/", "tests/tasks/test_conditional_") if group in file)
            return next(shared, file)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _plain_curves() -> Iterator[None]:
    with PLAIN:
        yield


@pytest.fixture
def drawn_curves() -> Iterator[None]:
    """Trainings of this test draw their curves, as users' do."""
    with mock.patch.object(plots, "report", report):
        yield


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
