"""Condition stages without weights: their tokens, and the values that they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tamingfast.models import condition_stages
from tamingfast.models.condition_stages import CoordStage, Labelator


def test_labels():
    tokens, _, info = Labelator(10).encode(torch.tensor([3, 7]))
    assert tokens.tolist() == [[3], [7]] and info[2].dtype == torch.int64
    assert Labelator(10).decode(tokens).tolist() == [3, 7]
    with pytest.raises(ValueError, match="0 to 9"):
        Labelator(10).encode(torch.tensor([10]))


def test_coordinates():
    stage = CoordStage(n_embed=8, down_factor=2)
    c = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
    _, _, (_, _, tokens) = stage.encode(c)
    assert_close(tokens, (8 * F.avg_pool2d(c, 2)).round().long())
    assert stage.decode(tokens.float()).shape == c.shape
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stage.encode(c + 1)


def test_labels_out_of_range_are_found_without_reading_them(monkeypatch):
    monkeypatch.setattr(condition_stages, "_READ_ON", ())
    assert Labelator(3).encode(torch.tensor([0, 2]))[0].tolist() == [[0], [2]]
    for wrong in (-1, 3):
        with pytest.raises(RuntimeError, match="a class label is out of range"):
            Labelator(3).encode(torch.tensor([0, wrong]))
