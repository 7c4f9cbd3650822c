"""Timing of sampling, as the experiments of `tamingfast.reproduce` report it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast import tasks
from tamingfast.sampling import sample_grid

#: Consecutive steps that are timed at each prefix length.
STEPS_PER_NODE = 4


class Timer:
    """Times the sampling of batches of token grids (rows, columns) from one model, and their decoding.

    ``options`` go to `tamingfast.sampling.sample_grid`; ``repeats`` is how many times what is short is measured.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, int], options: Mapping[str, Any], repeats: int):
        self.model, self.grid, self.options, self.repeats = model, grid, dict(options), repeats
        self.tokens = grid[0] * grid[1]

    def figures(self, seconds: float, batch: int) -> dict[str, Any]:
        """What the report says of a batch that took ``seconds``."""
        return {
            "seconds_per_image": seconds / batch,
            "tokens_per_second": batch * self.tokens / seconds,
            "tokens": self.tokens,
            "batch": batch,
        }

    def whole(self, batch: int, **how: Any) -> float:
        """Seconds to draw and decode ``batch`` images, once; a row drawn before warms up.

        ``how`` is options of `sample_grid` that win over the timer's own.
        """
        self.row(batch, repeats=1, **how)
        return self._clock(lambda: self.model.decode_grid(self._sample(batch, **how)))

    def decode(self, batch: int) -> float:
        """Seconds to decode ``batch`` images, the median of several."""
        grid = torch.zeros(batch, *self.grid, dtype=torch.int64, device=self.model.device)
        return self._median(lambda: self.model.decode_grid(grid), self.repeats)

    def naive_steps(self, batch: int, lengths: Sequence[int]) -> list[float]:
        """Seconds of one full forward pass and token choice after each number of image tokens.

        A few steps in a row, less what a call costs that draws nothing, the medians of several.
        """
        mask = torch.zeros(self.tokens, dtype=torch.bool)
        idle = self._median(lambda: self._sample(batch, mask=mask, backend="naive"), self.repeats)
        seconds = []
        for length in lengths:
            here = mask.clone()
            here[length : length + STEPS_PER_NODE] = True
            busy = self._median(lambda here=here: self._sample(batch, mask=here, backend="naive"), self.repeats)
            seconds.append((busy - idle) / STEPS_PER_NODE)
        return seconds

    def paper_protocol(self, batch: int, prefixes: int, whole: bool) -> dict[str, Any]:
        """`figures` of the paper's way, a full forward pass for each token, decoding included.

        Timed over a whole run without ``prefixes``; else at as many evenly spread numbers of known tokens, interpolated
        and summed over all steps, with ``whole`` over a whole run too, as a check.
        """
        measured = self.whole(batch, backend="naive") if whole or not prefixes else None
        if not prefixes:
            return self.figures(measured, batch) | {"integrated": False}
        nodes = np.linspace(0, self.tokens - STEPS_PER_NODE, prefixes).astype(int).tolist()
        step_seconds = self.naive_steps(batch, nodes)
        middles = [node + (STEPS_PER_NODE - 1) / 2 for node in nodes]
        every_step = np.interp(np.arange(self.tokens), middles, step_seconds)
        return self.figures(float(every_step.sum()) + self.decode(batch), batch) | {
            "integrated": True,
            "prefixes": nodes,
            "step_seconds": step_seconds,
            "whole_run_seconds_per_image": measured and measured / batch,
        }

    def row(self, batch: int, repeats: int | None = None, **how: Any) -> float:
        """Seconds to draw the middle row of ``batch`` images on a known upper half, the median of several."""
        mask = torch.zeros(self.grid, dtype=torch.bool)
        mask[self.grid[0] // 2] = True
        return self._median(lambda: self._sample(batch, mask=mask, **how), repeats or self.repeats)

    def _sample(self, batch: int, mask: Tensor | None = None, **how: Any) -> Tensor:
        if mask is not None:
            start = torch.zeros(batch, *self.grid, dtype=torch.int64, device=self.model.device)
            how |= {"start": start, "mask": mask.view(self.grid)}
        return sample_grid(self.model, tasks.conditions(self.model, batch), *self.grid, **(self.options | how))

    def _median(self, work: Callable[[], Any], repeats: int) -> float:
        work()
        return float(np.median([self._clock(work) for _ in range(repeats)]))

    def _clock(self, work: Callable[[], Any]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
