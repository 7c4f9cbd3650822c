"""A tiny prior without classes and the packaged model, each with a desk."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from tamingfast import tasks
from tamingfast.ui.desks import Desk
from tamingfast.ui.studio import Studio


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def studio(runs: Path, tmp_path: Path) -> Studio:
    return Studio(tasks.Unread(runs / "prior", "cpu"), folder_in(tmp_path))


@pytest.fixture
def demo(tmp_path: Path) -> Studio:
    return Studio(tasks.Unread("demo", "cpu"), folder_in(tmp_path))


@pytest.fixture
def desk(studio: Studio) -> Desk:
    return studio.desks.of("somebody")


def folder_in(place: Path) -> Path:
    folder = place / "desks"
    folder.mkdir(exist_ok=True)
    return folder
