"""Samples a grid of tokens of any size with an engine, in the order of a schedule."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tamingfast.engines import GPTEngine, borrowed_engine, guides, measures_passes
from tamingfast.engines.networks import Transformer
from tamingfast.engines.request import check_lookahead
from tamingfast.engines.selection import choose_engine, log_once
from tamingfast.errors import UserError
from tamingfast.ops.choice import Choice, best, choose, gumbel_noise
from tamingfast.sampling.decoders import CachedDecoder, Decoder, NaiveDecoder, NativeDecoder
from tamingfast.sampling.guessed_waves import GuessedWaves, SpanEngine, TorchSpans, torch_cost
from tamingfast.sampling.guidance import Guidance
from tamingfast.sampling.lookahead import SIZES, WORTH_MEASURING, PassCost
from tamingfast.sampling.plan import GridPlan, Sampled, as_given, checked_tokens, plan_grid
from tamingfast.sampling.schedule import Schedule
from tamingfast.sampling.waves import MEMORY, NativeWaves, TorchWaves, WaveEngine, plan_waves, sample_waves

#: Noise values drawn at a time: enough to hide the generator's launches, few enough to stay below 64 MiB.
NOISE_ENTRIES = 1 << 20
#: Tokens between reports where the grid is a single row.
REPORTED = 16


@torch.no_grad()
def sample_grid(
    transformer: Sampled,
    cond: Tensor,
    height: int,
    width: int,
    *,
    window: int = 16,
    schedule: str = "paper",
    stride: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    seed: int = 0,
    first_image: int = 0,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    engine: str = "auto",
    dtype: str | None = None,
    memory: int = MEMORY,
    lookahead: int | None = None,
    drafts: bool = False,
    cfg: float | str | None = None,
    callback: Callable[[int, int], None] | None = None,
    observer: Callable[[Tensor, Tensor], None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Samples the image tokens of a batch of grids inside sliding windows.

    The result is that of sampling one cell after the other in the order of the schedule. Where several windows cover
    the grid and attention is causal over image tokens, cells whose context is known are nevertheless computed together.

    A window's sequence is its condition followed by its image tokens without the last; the logits of image token i
    are at index c - 1 + i. Source: Esser et al. 2021, section 3.3 and figure 3.

    Args:
        transformer: a `GPT`, or a `Net2NetTransformer`: then its permuter gives the token order (one window only; the
            noise stays keyed by the true row and column), and entries beyond the first stage's codebook are never
            chosen. A `MultiscaleTransformer` draws its `canvas_size`, always in one window.
        cond: integer (B, c), c >= 1, the same prefix in every window; (B, height, width), cropped with it; or
            (B, height, width, c), which gives each window the prefix at its upper left corner.
        height, width: of the grid, in tokens.
        window: side of the attention window in tokens; it is cut to the grid where the grid is smaller.
        schedule: "paper", "scene", "strided" or "block"; see `tamingfast.sampling.schedule`.
        stride: step of the window in tokens, for "strided" and "block".
        temperature, top_k, top_p: see `tamingfast.ops.choice.choose`.
        greedy: take the best token everywhere, without noise, temperature and filters.
        seed: 0 to 2**64 - 1. A token's noise depends on the seed and on the image's number, row and column only.
        first_image: number of the batch's first image, so that a large run may be cut into batches of any size.
        start: integer (B, k), the first k tokens of the sequence, where one window covers the grid; or
            (B, height, width) together with ``mask``.
        mask: bool (height, width) or (B, height, width); True samples, False keeps the token of ``start``.
        engine: "native" (C++ on a CPU, CUDA on a GPU), "torch" (with a static key/value cache), "naive" (the paper's
            full forward pass for every token) or "auto", the fastest that can run.
        dtype: the weights' type while sampling: "float32", "bfloat16", "float16" (not in the CPU engine), "int8" (only
            in the CPU engine), or None for the model's own. Any other type than the model's own works on a copy; so
            does "native", which keeps its copy and its cache with the model until the weights change.
        memory: bytes for the keys and values of the windows that are open at once; with less, more is recomputed.
        lookahead: how many tokens of a window, or waves where the window moves, a pass chooses at most. 1 chooses what
            is known to be next; with more, tokens are guessed and checked, so that the same tokens take fewer passes.
            None takes what is fastest, and guesses none on a GPU with "native"; "naive" never does.
        drafts: keep an int8 copy of the weights with the native engine's on a CPU, a quarter of the memory of float32,
            which guesses where one window covers the grid and that is faster. The tokens are the same.
        cfg: scale of classifier-free guidance, or text such as "4:cosine"; for priors with a null class. None and 1
            guide nothing; see `tamingfast.sampling.guidance`.
        callback: called as callback(done, total), in cells, after every ``width`` of them and at the end.
        observer: called as observer(tokens int64 (B, height, width), pending bool (B, height, width)) whenever tokens
            were added; ``pending`` marks those still to come. It must not change them.
        backend: old name of ``engine``; gives a DeprecationWarning.

    Returns:
        int64 (B, height, width) on the transformer's device.

    Raises:
        UserError: an option outside its range, or a window that the transformer's block size cannot hold.
        ValueError: tensors of wrong shape or type, tokens outside the vocabulary, or logits with NaN.
    """
    if backend is not None:
        # The caller is two frames up: no_grad wraps this function.
        warnings.warn("sample_grid: backend= is the old name of engine=", DeprecationWarning, stacklevel=3)
        engine = backend
    check_lookahead(lookahead)
    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy, seed=seed)
    plan = plan_grid(transformer, cond, height, width, window, schedule, stride)
    images = image_numbers(first_image, plan.batch)
    canvas, wanted = _canvas(start, mask, plan)
    layout = plan.schedule.only(wanted.any(0).cpu().numpy())
    report = _Report(canvas, wanted, layout, callback, observer)
    chosen, dtype = choose_engine(engine, plan.gpt, dtype)
    measuring = chosen != "native" or measures_passes(plan.gpt)
    if lookahead is None and (report.total < WORTH_MEASURING or not measuring):
        lookahead = 1
    guidance = Guidance.of(cfg, plan)
    drawing = _Drawing(plan, layout, canvas, wanted, images, choice, report, lookahead, guidance)
    # Cells that do not depend on one another are computed together, where the cache of each window is exact; and so are
    # cells that are guessed, unless the engine does that.
    ahead = lookahead != 1 and chosen != "native"
    if guidance.copies > 1 and chosen == "native" and not guides(plan.gpt):
        log_once("With cfg, tokens are chosen in torch: the CUDA engine's own decoding has no guidance.")
        ahead = True  # waves choose in torch
    if chosen != "naive" and plan.causal and (ahead or not layout.single_window):
        drawing.by_waves(chosen, dtype, memory)
    elif chosen == "native":
        drawing.by_runs(dtype, drafts and measuring and lookahead != 1)
    else:
        drawing.one_by_one(chosen, dtype)
    return canvas.view(plan.batch, height, width)


class _Drawing:
    """One call of `sample_grid`: samples into ``canvas``, int64 (B, height * width), where ``wanted`` is True."""

    def __init__(
        self,
        plan: GridPlan,
        layout: Schedule,
        canvas: Tensor,
        wanted: Tensor,
        images: range,
        choice: Choice,
        report: _Report,
        lookahead: int | None,
        guidance: Guidance,
    ) -> None:
        self.guidance = guidance
        self.plan, self.layout, self.canvas, self.wanted = plan, layout, canvas, wanted
        self.images, self.choice, self.report, self.lookahead = images, choice, report, lookahead
        #: Leading tokens that are the same in every window.
        self.shared = plan.context.length if plan.context.fixed else 0

    def by_waves(self, engine: str, dtype: str, memory: int) -> None:
        """Each wave, that is, all cells whose context is known, in one ragged call."""
        plan, batch = self.plan, self.plan.batch
        each = batch * self.guidance.copies
        waves = plan_waves(plan.gpt, self.layout, each, plan.context.length, memory)
        slots = int(waves.slots.max(initial=-1)) + 1
        noise, n_unmasked = self.noise(waves.cells), plan.gpt.config.n_unmasked
        grid = (self.layout, waves, plan.context, self.canvas, self.wanted)
        if self.lookahead == 1:
            with _wave_engine(engine, plan, dtype, slots, each) as runner:
                sample_waves(runner, *grid, self.pick, noise, n_unmasked, self.report.added, self.guidance)
        else:
            with _span_engine(engine, plan, dtype, slots * each, measured=self.lookahead is None) as (spans, cost):
                GuessedWaves(
                    spans, *grid, self.best, noise, plan.vocab, n_unmasked, self.report.added, self.lookahead, cost,
                    self.guidance,
                ).run()  # fmt: skip

    def by_runs(self, dtype: str, drafts: bool) -> None:
        """Each run in one call of the native engine; reports a row of tokens at a time."""
        plan, layout = self.plan, self.layout
        every = layout.width if layout.height > 1 else REPORTED
        slots = plan.batch * self.guidance.copies
        with borrowed_engine(plan.gpt, dtype, slots, plan.length, drafts) as lent:
            decoder = NativeDecoder(
                lent, self.images, self.shared, plan.vocab, self.choice, self.lookahead, self.guidance
            )
            for run in layout.runs:
                self._decode_run(decoder, run.row, run.column, run.steps, layout.cells(run), every)

    def _decode_run(
        self, decoder: NativeDecoder, row: int, column: int, steps: np.ndarray, places: np.ndarray, every: int
    ) -> None:
        layout, prefix = self.layout, self.plan.context.length
        cells = torch.from_numpy(places).to(self.canvas.device)
        condition = self.plan.context.before(row * layout.width + column)
        sequence = torch.cat((condition, self.canvas[:, cells]), dim=1)
        reported = 0

        def report(done: int) -> None:
            nonlocal reported
            self.canvas[:, cells] = sequence[:, prefix:]
            self.report.added(cells[torch.from_numpy(steps[reported:done])])
            reported = done

        rows, columns = divmod(places[steps], layout.width)
        wanted = self.wanted[:, cells[torch.from_numpy(steps)]]
        progress = report if self.report.listened_to else None
        decoder.decode(
            sequence, (prefix + steps).tolist(), wanted, rows.tolist(), columns.tolist(), progress, every, layout.width
        )
        if reported < len(steps):
            report(len(steps))

    def one_by_one(self, engine: str, dtype: str) -> None:
        """Cell by cell, in torch."""
        layout, prefix = self.layout, self.plan.context.length
        noise = self.noise(layout.positions())
        with _evaluating(self.plan.gpt, dtype) as gpt:
            decoder = _decoder(engine, gpt, self.plan, self.shared, self.plan.batch * self.guidance.copies)
            for run in layout.runs:
                cells = torch.from_numpy(layout.cells(run)).to(self.canvas.device)
                condition = self.plan.context.before(run.row * layout.width + run.column)
                sequence = self.guidance.beside(torch.cat((condition, self.canvas[:, cells]), dim=1))
                sampled = self.wanted[:, cells]
                decoder.enter(sequence)
                for step in run.steps.tolist():
                    logits = self.guidance.combined(decoder.logits(prefix + step), cells[step])
                    token = self.pick(logits, next(noise))
                    token = torch.where(sampled[:, step], token, self.canvas[:, cells[step]])
                    sequence[:, prefix + step] = token.repeat(self.guidance.copies)
                    self.canvas[:, cells[step]] = token
                    self.report.added(cells[step : step + 1])

    def pick(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Tokens (...) from logits (..., V) and noise of the codes that may be chosen, or None for the best."""
        choice = self.choice
        return choose(
            logits[..., : self.plan.vocab], noise, temperature=choice.temperature, top_k=choice.top_k,
            top_p=choice.top_p,
        )  # fmt: skip

    def best(self, logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `pick`, with the tokens' scores; see `tamingfast.ops.choice.best`."""
        choice = self.choice
        return best(logits, noise, temperature=choice.temperature, top_k=choice.top_k, top_p=choice.top_p)

    def noise(self, cells: np.ndarray) -> Iterator[Tensor | None]:
        """Noise (B, codes) of each cell, a raster index, in turn; None for each where sampling is greedy."""
        if self.choice.greedy:
            return itertools.repeat(None)
        return self._drawn(cells)

    def _drawn(self, cells: np.ndarray) -> Iterator[Tensor]:
        device, vocab, width = self.canvas.device, self.plan.vocab, self.layout.width
        images = torch.arange(self.images.start, self.images.stop, dtype=torch.int64, device=device)[:, None]
        at_once = max(1, NOISE_ENTRIES // max(1, len(self.images) * vocab))
        for part in torch.from_numpy(cells).to(device).split(at_once):
            yield from gumbel_noise(self.choice.seed, images, part // width, part % width, vocab).unbind(1)


@contextmanager
def _wave_engine(engine: str, plan: GridPlan, dtype: str, slots: int, batch: int) -> Iterator[WaveEngine]:
    if engine == "native":
        with borrowed_engine(plan.gpt, dtype, slots * batch, plan.length) as lent:
            yield NativeWaves(lent, batch)
    else:
        with _evaluating(plan.gpt, dtype) as gpt:
            yield TorchWaves(gpt, slots, batch, plan.length)


@contextmanager
def _span_engine(
    engine: str, plan: GridPlan, dtype: str, slots: int, measured: bool
) -> Iterator[tuple[SpanEngine, PassCost | None]]:
    """An engine with that many slots and, if it is to be ``measured``, what its passes cost."""
    if engine == "native":
        with borrowed_engine(plan.gpt, dtype, slots, plan.length) as lent:
            yield lent, PassCost(lent.pass_seconds(SIZES)) if measured and isinstance(lent, GPTEngine) else None
    else:
        with _evaluating(plan.gpt, dtype) as gpt:
            yield TorchSpans(gpt, slots, plan.length), torch_cost(gpt, plan.gpt) if measured else None


def _decoder(engine: str, gpt: Transformer, plan: GridPlan, shared: int, batch: int) -> Decoder:
    if engine == "naive":
        # In a whole window, image tokens that attend in both directions would see tokens that are not sampled yet.
        return NaiveDecoder(gpt, whole_window=plan.causal and not plan.schedule.single_window)
    if not plan.causal:
        log_once(
            f"The transformer attends in both directions over {gpt.config.n_unmasked} tokens, more than the condition "
            "has, so no key/value cache is exact and every token takes a full forward pass."
        )
        return NaiveDecoder(gpt, whole_window=False)
    return CachedDecoder(gpt, batch, plan.length, shared)


def image_numbers(first_image: int, batch: int) -> range:
    """The images' numbers; UserError unless they fit the noise's 32 bits."""
    if not 0 <= first_image <= (1 << 32) - batch:
        raise UserError(f"first_image: got {first_image}, expected 0 to 2**32 - {batch}, as image numbers have 32 bits")
    return range(first_image, first_image + batch)


def _canvas(start: Tensor | None, mask: Tensor | None, plan: GridPlan) -> tuple[Tensor, Tensor]:
    """The grid before sampling, int64 (B, height * width), and where to sample, bool of the same shape."""
    layout, batch, device = plan.schedule, plan.batch, plan.device
    grid = (batch, layout.height, layout.width)
    canvas = torch.zeros(batch, layout.height * layout.width, dtype=torch.int64, device=device)
    wanted = torch.ones_like(canvas, dtype=torch.bool)
    start = None if start is None else as_given("start", start)
    if mask is not None:
        mask = as_given("mask", mask)
        if start is None or start.shape != grid:
            got = "None" if start is None else f"shape {tuple(start.shape)}"
            raise ValueError(f"start: got {got}, expected shape {grid}, as there is a mask")
        if mask.dtype != torch.bool or mask.shape not in (grid, grid[1:]):
            raise ValueError(f"mask: got {mask.dtype} {tuple(mask.shape)}, expected bool {grid[1:]} or {grid}")
        wanted = mask.to(device).expand(grid).flatten(1)
        kept = start.to(device).masked_fill(wanted.view(grid), 0)  # what is resampled may hold anything
        canvas = checked_tokens("start", kept, plan.vocab, device).flatten(1)
    elif start is not None:
        if not layout.single_window:
            raise ValueError(
                f"start: got {tuple(start.shape)} without a mask, expected both where several windows cover a grid"
            )
        limit = layout.window_tokens
        if start.ndim != 2 or start.shape[0] != batch or start.shape[1] > limit:
            raise ValueError(
                f"start: got shape {tuple(start.shape)}, expected ({batch}, k), the first k of {limit} tokens, or a "
                "mask as well"
            )
        given = torch.from_numpy(layout.order[: start.shape[1]]).to(device)
        canvas[:, given] = checked_tokens("start", start, plan.vocab, device)
        wanted[:, given] = False
    return canvas, wanted


class _Report:
    """Passes what has been sampled on to the callback and the observer of `sample_grid`."""

    def __init__(
        self,
        canvas: Tensor,
        wanted: Tensor,
        plan: Schedule,
        callback: Callable[[int, int], None] | None,
        observer: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        self.shape = (len(canvas), plan.height, plan.width)
        self.canvas, self.pending = canvas, wanted.clone()
        self.callback, self.observer = callback, observer
        self.done, self.total = 0, int(plan.wanted.sum())
        self.listened_to = callback is not None or observer is not None

    def added(self, cells: Tensor) -> None:
        """Report that the tokens at raster indices ``cells`` are sampled."""
        width, before = self.shape[2], self.done
        self.done += len(cells)
        if self.callback is not None:
            for row in range(before // width + 1, self.done // width + 1):
                self.callback(row * width, self.total)
            if self.done == self.total and self.done % width:
                self.callback(self.done, self.total)
        if self.observer is not None:
            self.pending[:, cells] = False
            self.observer(self.canvas.view(self.shape), self.pending.view(self.shape))


@contextmanager
def _evaluating(gpt: Transformer, dtype: str) -> Iterator[Transformer]:
    """The transformer in eval mode, with weights of the given type; the caller's own is restored afterwards.

    Autocast is off: ``dtype`` alone decides, as in the native engines.
    """
    if getattr(torch, dtype) != next(gpt.parameters()).dtype:
        gpt = copy.deepcopy(gpt).to(getattr(torch, dtype))
    training = [module for module in gpt.modules() if module.training]
    gpt.eval()
    try:
        with torch.autocast(next(gpt.parameters()).device.type, enabled=False):
            yield gpt
    finally:
        for module in training:
            module.training = True
