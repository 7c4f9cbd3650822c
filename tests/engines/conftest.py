"""Where the tests of the CUDA engine run."""

from __future__ import annotations

import pytest
from engine_cases import Place


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Place:
    return Place("cpu" if request.param == "host" else "cuda")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of like spans takes tiles, however few they are."""
    monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", 0)
