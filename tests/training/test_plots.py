"""The curves of a run, and its events for TensorBoard."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from tamingfast import UserError
from tamingfast.checkpoints import run_directory
from tamingfast.training import loop, plots


def test_a_run_draws_its_curves(tmp_path, drawn_curves):
    run = tiny.train("vqgan", tmp_path / "run", steps=2)
    with Image.open(run / run_directory.PLOT) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_curves_are_the_recorded_values(first_stage):
    records = run_directory.read_metrics(first_stage)
    curves = plots.curves_of(records, "rec_loss")
    for split, points in curves.items():
        assert points == [(line["step"], line["rec_loss"]) for line in records if line["split"] == split]
    assert len(curves["train"]) == 2 and curves["validation"]
    assert plots.curves_of(records, "nothing") == {"train": [], "validation": []}


def test_values_that_are_not_finite_are_left_out():
    lines = [{"step": step, "split": "train", "loss": value} for step, value in enumerate((1.0, float("nan"), 3.0))]
    assert plots.curves_of(lines, "loss")["train"] == [(0, 1.0), (2, 3.0)]


def test_many_points_are_averaged():
    points = [(float(x), float(x % 7)) for x in range(1001)]
    fewer = plots.averaged(points, 200)
    assert len(fewer) <= 200
    assert fewer[0] == (np.mean(range(6)), np.mean([x % 7 for x in range(6)]))
    assert plots.averaged(points[:200], 200) == points[:200] and plots.averaged([], 200) == []


def test_without_matplotlib_a_run_has_no_curves(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    out = tiny.train("vqgan", tmp_path / "run", steps=1)
    assert run_directory.exists(out) and not (out / run_directory.PLOT).exists()


def test_curves_are_drawn_between_checkpoints_after_a_while(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(loop, "BETWEEN_PLOTS", -1)
    monkeypatch.setattr(loop, "plot", lambda out, shown: drawn.append(len(run_directory.read_metrics(out, "train"))))
    tiny.train("vqgan", tmp_path / "run", steps=3, checkpoint_every=1)
    assert drawn == [1, 2, 3, 3]


def test_events_need_their_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="^training.tensorboard: got .* 'pip install tensorboard'"):
        tiny.train("vqgan", tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_events_hold_what_the_metrics_hold(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"checkpoint_every": 4, "validate_every": 2, "tensorboard": True}
    out = tiny.train("vqgan", tmp_path / "run", steps=4, **settings)
    tiny.train("vqgan", out, resume=True, steps=6, **settings)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for split in ("train", "validation"):
        found = {event.step: event.value for event in events.Scalars(f"{split}/rec_loss")}
        assert found == pytest.approx({m["step"]: m["rec_loss"] for m in run_directory.read_metrics(out, split)})
