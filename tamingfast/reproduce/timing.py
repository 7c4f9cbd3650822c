"""Timing of sampling, for the reports of the experiments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamingfast import tasks
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.sampling import sample_grid

#: Consecutive steps that are timed at each prefix length.
STEPS_PER_NODE = 4


class Timer:
    """Times how one prior samples batches of token grids (rows, columns) and decodes them.

    ``options`` go to `tamingfast.sampling.sample_grid`; short measurements are repeated ``repeats`` times.
    """

    def __init__(self, prior: Net2NetTransformer, grid: tuple[int, int], options: Mapping[str, Any], repeats: int):
        self.prior, self.grid, self.options, self.repeats = prior, grid, dict(options), repeats
        self.tokens = grid[0] * grid[1]

    def figures(self, seconds: float, batch: int) -> dict[str, Any]:
        """The report's entry for a batch that took ``seconds``."""
        return {
            "seconds_per_image": seconds / batch,
            "tokens_per_second": batch * self.tokens / seconds,
            "tokens": self.tokens,
            "batch": batch,
        }

    def whole(self, batch: int, **how: Any) -> float:
        """Seconds to sample and decode ``batch`` images once, after a row of tokens as warm-up.

        ``how`` are options of `sample_grid` that replace the timer's own.
        """
        self.row(batch, repeats=1, **how)
        return self._clock(lambda: self.prior.decode_grid(self._sample(batch, **how)))

    def decode(self, batch: int) -> float:
        """Seconds to decode ``batch`` images, the median of several measurements."""
        grid = self._zeros(batch)
        return self._median(lambda: self.prior.decode_grid(grid), self.repeats)

    def naive_steps(self, batch: int, lengths: Sequence[int]) -> list[float]:
        """Seconds of one full forward pass and token choice after each number of image tokens in ``lengths``.

        This is the time of `STEPS_PER_NODE` consecutive steps, less that of a call that samples nothing, divided by the
        number of steps; both times are medians of several measurements.
        """
        mask = torch.zeros(self.tokens, dtype=torch.bool)
        idle = self._median(lambda: self._sample(batch, mask=mask, engine="naive"), self.repeats)
        seconds = []
        for length in lengths:
            here = mask.clone()
            here[length : length + STEPS_PER_NODE] = True

            def steps(here: Tensor = here) -> Tensor:
                return self._sample(batch, mask=here, engine="naive")

            seconds.append((self._median(steps, self.repeats) - idle) / STEPS_PER_NODE)
        return seconds

    def paper_protocol(self, batch: int, prefixes: int, whole: bool) -> dict[str, Any]:
        """`figures` of the paper's protocol, a full forward pass for each token, decoding included.

        With ``prefixes`` 0 a whole run is timed. Otherwise the steps at that many evenly spaced prefix lengths are
        timed, interpolated and summed over all steps; with ``whole`` a whole run is timed as well, as a check.
        """
        if not prefixes:
            return self.figures(self.whole(batch, engine="naive"), batch) | {"integrated": False}
        check = self.whole(batch, engine="naive") / batch if whole else None
        nodes = np.linspace(0, self.tokens - STEPS_PER_NODE, prefixes).astype(int).tolist()
        step_seconds = self.naive_steps(batch, nodes)
        middles = [node + (STEPS_PER_NODE - 1) / 2 for node in nodes]
        every_step = np.interp(np.arange(self.tokens), middles, step_seconds)
        decode = self.decode(batch)
        return self.figures(float(every_step.sum()) + decode, batch) | {
            "integrated": True,
            "decode_seconds": decode,
            "prefixes": nodes,
            "step_seconds": step_seconds,
            "whole_run_seconds_per_image": check,
        }

    def row(self, batch: int, repeats: int | None = None, **how: Any) -> float:
        """Seconds to sample the middle row of ``batch`` images below a given upper half, a median of ``repeats``."""
        mask = torch.zeros(self.grid, dtype=torch.bool)
        mask[self.grid[0] // 2] = True
        return self._median(lambda: self._sample(batch, mask=mask, **how), repeats or self.repeats)

    def _sample(self, batch: int, mask: Tensor | None = None, **how: Any) -> Tensor:
        if mask is not None:
            how |= {"start": self._zeros(batch), "mask": mask.view(self.grid)}
        return sample_grid(self.prior, tasks.conditions(self.prior, batch), *self.grid, **(self.options | how))

    def _zeros(self, batch: int) -> Tensor:
        return torch.zeros(batch, *self.grid, dtype=torch.int64, device=self.prior.device)

    def _median(self, work: Callable[[], object], repeats: int) -> float:
        work()
        return float(np.median([self._clock(work) for _ in range(repeats)]))

    def _clock(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.prior.device.type == "cuda":
            torch.cuda.synchronize(self.prior.device)
