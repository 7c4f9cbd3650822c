"""Building blocks shared by reports, and claims that a report must not make."""

from __future__ import annotations

import pytest

from tamingfast import report
from tamingfast.reproduce import compression_report, pixels_report


def test_numbers_in_words():
    assert [report.counted(number, "thread") for number in (0, 1, 2, 1500)] == [
        "0 threads", "1 thread", "2 threads", "1,500 threads"
    ]  # fmt: skip
    assert report.geometry({"n_layer": 1, "n_head": 2, "n_embd": 32}) == "1 layer, 2 heads, width 32"
    assert [report.duration(seconds) for seconds in (0.034, 5.25, 59.4, 59.6, 1056)] == [
        "0.034 s", "5.2 s", "59 s", "1.0 min", "17.6 min"
    ]  # fmt: skip


@pytest.mark.parametrize(("preset", "warned"), [("smoke", True), ("cpu", False), ("paper", False)])
def test_the_smoke_preset_says_what_can_be_expected_of_it(preset, warned):
    machine = {"cpu": "a processor", "threads": 2, "gpu": "no GPU", "torch": "2.13", "python": "3.11"}
    text = report.provenance({"data": "photographs", "machine": machine, "seconds": 5.0, "preset": preset})
    assert ("**What to expect.**" in text and "preset `cpu`" in text) == warned


@pytest.mark.parametrize(("whole_run", "trusted"), [(1.05, True), (2.0, False)])
def test_a_ratio_to_an_unreliable_time_is_not_reported(whole_run, trusted):
    row = {"seconds_per_image": 1.0, "tokens_per_second": 4.0, "tokens": 4, "batch": 1, "integrated": True}
    paper = row | {"prefixes": [0], "whole_run_seconds_per_image": whole_run}
    fastest = row | {"seconds_per_image": 0.01, "engine": "native", "dtype": None, "candidates": [{}]}
    both = {name: dict.fromkeys(("pixels", "latents"), row) for name, row in (("paper", paper), ("fastest", fastest))}
    first, *rest = pixels_report._speed_notes(both | {"batch": 1}).splitlines()
    assert ("**100 times** faster" in first, "Do not use the figures of (a)" in first) == (trusted, not trusted)
    assert "times** faster" not in "".join(rest) and "1 prefix length and" in "".join(rest)


def test_stars_that_coincide_are_all_visible_and_named_once(tmp_path, monkeypatch):
    def speed(*seconds):
        ways = zip(("paper", "engine", "strided"), seconds, strict=True)
        return {way: {"seconds_per_image": value} for way, value in ways}

    rows = [
        {"label": "f = 2", "levels": 1, "pixels_per_token": 4.0, "speed": speed(8.0, 4.0, 2.0)},
        {"label": "f = 4 over 2", "levels": 2, "pixels_per_token": 5.0, "speed": speed(7.0, 1.0, 1.0)},
    ]
    plotted = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: plotted.append(figure))
    compression_report.plot_speed(rows, tmp_path / "speed.png")
    (axis,) = plotted[0].axes
    stars = [line for line in axis.lines if line.get_marker() == "*"]
    assert [float(star.get_ydata()[0]) for star in stars] == [7.0, 1.0, 1.0]
    assert stars[1].get_markersize() > stars[2].get_markersize()
    assert [note.get_text() for note in axis.texts] == ["f = 4 over 2"] * 2


def test_a_report_says_what_pictures_of_so_few_steps_can_show():
    runs = [{"label": "first stage", "steps": 30}, {"label": "latents", "steps": 5000}]
    assert "do not resemble the half that was kept" in pixels_report._what_to_expect(runs)
    assert pixels_report._what_to_expect(runs[1:]) == "Steps of training: latents 5000."
