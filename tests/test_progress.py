"""Progress that is printed where there is no terminal."""

from __future__ import annotations

import pytest
import tiny

from tamingfast import progress


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)


def test_a_line_for_each_state(always, capsys):
    with progress.bar(" images", 10, desc="encoding") as bar:
        bar.update(3)
        bar.set_postfix({"loss": 1.5}, refresh=False)
        bar.moved(20, 40)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("encoding: 3 of 10, ") and first.endswith(" left")
    assert second.startswith("encoding: 20 of 40, ") and second.endswith(" left, loss=1.5")


def test_without_a_total(always, capsys):
    with progress.bar("step") as bar:
        bar.update()
    assert capsys.readouterr().err.startswith("step: 1, ")


def test_short_work_and_silent_counters_print_nothing(capsys, monkeypatch):
    with progress.bar("step", 10) as bar:
        bar.update(10)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for bar in (progress.bar("step", 10, disable=True), progress.silent("step", 10)):
        with bar:
            bar.update(10)
            bar.moved(3, 20)
    assert not capsys.readouterr().err


def test_training_prints_its_steps_and_its_loss(always, capsys, tmp_path):
    tiny.train("vqgan", tmp_path / "run", steps=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["run: 1 of 2", "run: 2 of 2"]
    assert "left" in lines[1] and "rec_loss=" in lines[1]
