"""What a run says after its first steps."""

from __future__ import annotations

import pytest

from tamingfast.training.forecast import Forecast


def told(times: list[tuple[float, float]], steps: int | None, seconds: float | None, device: str = "cpu") -> list[str]:
    forecast = Forecast(device)
    return [said for reading, whole in times if (said := forecast.after(reading, whole, steps, seconds)) is not None]


def test_after_five_steps_and_once():
    assert told([(0.0, 0.5)] * 4, 995, None) == []
    assert told([(0.0, 9.0)] + [(0.0, 0.5)] * 20, 1200, None) == [
        "0.5 s a step, 0% of it waiting for data: about 10 min to go"
    ]


def test_after_twenty_seconds_when_steps_are_slow():
    (said,) = told([(1.0, 24.0)] * 3, 99_999, None)
    assert said.startswith("24 s a step, 4% of it waiting for data: about 28 days to go; shorter with a GPU, ")
    assert "training.seconds" in said and "tamingfast train --help" in said
    (said,) = told([(1.0, 24.0)], 99_999, None, "cuda")
    assert "a GPU" not in said and "shorter with a lower training.steps" in said


@pytest.mark.parametrize(
    ("steps", "seconds", "said"),
    [(None, 240.0, "about 4 min to go"), (70, 240.0, "about 70 s to go"), (None, None, "runs until it is stopped")],
)
def test_what_ends_the_run(steps, seconds, said):
    (line,) = told([(0.0, 1.0)] * 5, steps, seconds)
    assert line.endswith(said)


def test_runs_of_seconds_say_nothing():
    assert told([(0.0, 1.0)] * 9, 50, None) == [] and told([(1.0, 1.0)] * 9, None, 40) == []


def test_slow_data_are_named():
    (said,) = told([(2.0, 3.0)] * 5, 100, None)
    assert "67% of it waiting for data" in said and "training.workers=N" in said
