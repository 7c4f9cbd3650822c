"""How long a run will take, told after its first steps, and what would shorten it."""

from __future__ import annotations

from statistics import median

from tamingfast.presets import duration

#: The forecast comes after so many steps or seconds, whichever is first.
_STEPS, _SECONDS = 5, 20.0
#: Seconds of a run up to which nothing is said, and from which on there is advice.
_SHORT, _LONG = 60.0, 2 * 3600.0
#: Share of a step beyond which reading data is the first thing to shorten.
_MUCH = 0.5


class Forecast:
    """Collects the times of the first steps, and says once what follows from them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._steps: list[tuple[float, float]] = []
        self._told = False

    def after(self, reading: float, whole: float, steps: int | None, seconds: float | None) -> str | None:
        """The sentence that is due after a step of ``whole`` seconds, ``reading`` of which it waited for data, or None.

        ``steps`` and ``seconds`` are what is left of the run, None where nothing ends it. The median of the times
        counts, because first steps prepare what later ones only use.
        """
        if self._told:
            return None
        self._steps.append((reading, whole))
        if len(self._steps) < _STEPS and sum(each for _, each in self._steps) < _SECONDS:
            return None
        self._told = True
        step = median(each for _, each in self._steps)
        share = sum(each for each, _ in self._steps) / sum(each for _, each in self._steps)
        left = min((end for end in (steps and steps * step, seconds) if end is not None), default=None)
        if left is not None and left < _SHORT:
            return None
        length = "it runs until it is stopped" if left is None else f"about {duration(left / 3600)} to go"
        said = [f"{_seconds(step)} a step, {share:.0%} of it waiting for data: {length}"]
        return "; ".join(said + self._advice(share, left if seconds is None else None))

    def _advice(self, share: float, left: float | None) -> list[str]:
        advice = []
        if share > _MUCH:
            advice.append("data take most of the time: give training.workers=N, or smaller image files")
        if left is not None and left > _LONG:
            shorter = "a lower training.steps or data.size, or a smaller model"
            if self._device == "cpu":
                shorter = f"a GPU, a preset for a CPU (`tamingfast train --help`), {shorter}"
            advice.append(f"shorter with {shorter}; training.seconds=3600 ends after an hour")
        return advice


def _seconds(time: float) -> str:
    return f"{time:.2g} s" if time < 10 else f"{time:.0f} s"
