"""A small transformer shared by the tests of sampling."""

from __future__ import annotations

import pytest
from gpts import tiny_gpt

from tamingfast.models.gpt import GPT


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return tiny_gpt()
