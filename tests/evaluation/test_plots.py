"""Plots of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tamingfast import UserError, evaluation

ROWS = [
    {"name": name, "nats": 1.0 + i, "tokens_per_token": work}
    for i, (name, work) in enumerate((("paper", 200.0), ("strided 8", 6.0), ("block 8", 6.0)))
]


def test_schedules_are_plotted_over_tokens_or_seconds(tmp_path):
    evaluation.plot_schedules(tmp_path / "tokens.png", ROWS)
    evaluation.plot_schedules(tmp_path / "seconds.png", [row | {"seconds": 1.0 + i} for i, row in enumerate(ROWS)])
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("tokens", "seconds"))
    assert len(np.unique(first)) > 10 and (first != second).any()


def test_lookahead_is_plotted_in_panels(tmp_path):
    lines = {"half": {1: 1.0, 2: 1.5, 4: 2.0}, "all": {1: 1.0, 2: 2.0, 4: 4.0}}
    evaluation.plot_lookahead(tmp_path / "one.png", {"first": lines})
    evaluation.plot_lookahead(tmp_path / "two.png", {"first": lines, "second": lines})
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two"))
    assert one.shape[0] == two.shape[0] and two.shape[1] == 2 * one.shape[1]
    assert len(np.unique(one)) > 10


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"c.xyz: got the suffix '.xyz', expected .png"):
        evaluation.plot_schedules(tmp_path / "c.xyz", ROWS)
    assert not list(tmp_path.iterdir())
