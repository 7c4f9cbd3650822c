"""Samples a grid of tokens of any size: drives a backend through a schedule."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast import engines
from tamingfast.errors import UserError
from tamingfast.ops import backends
from tamingfast.ops.choice import Choice, choose, gumbel_noise
from tamingfast.sampling.context import Context
from tamingfast.sampling.decoders import CachedDecoder, Decoder, NaiveDecoder, NativeDecoder, Task
from tamingfast.sampling.schedule import Schedule, make_schedule, one_window
from tamingfast.sampling.waves import MEMORY, NativeEngine, TorchEngine, plan_waves, sample_waves

BACKENDS = ("auto", "native", "torch", "naive")
DTYPES = ("float32", "bfloat16", "float16", "int8")
#: Drawn at a time: enough to hide the generator's launches, few enough to stay below 64 MiB.
NOISE_ENTRIES = 1 << 20
#: Tokens between reports where the grid is a single row.
REPORTED = 16

log = logging.getLogger(__name__)


@torch.no_grad()
def sample_grid(
    transformer: nn.Module,
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
    backend: str = "auto",
    dtype: str | None = None,
    memory: int = MEMORY,
    callback: Callable[[int, int], None] | None = None,
    observer: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Samples the image tokens of a batch of grids inside sliding windows.

    The tokens are those of one position after the other in raster order. Where several windows cover the grid and
    attention is causal over image tokens, positions whose context is known are computed together all the same.

    A window's sequence is its conditioning followed by its image tokens without the last; the logits of
    image token i stand at index c - 1 + i. Source: Esser et al. 2021, section 3.3 and figure 3.

    Args:
        transformer: a `GPT`, or a `Net2NetTransformer`: then its permuter gives the token order (one window
            only; noise stays keyed by the true row and column), and entries beyond the first stage's codebook
            are never chosen. A `MultiscaleTransformer` draws its `canvas_size`, always in one window.
        cond: integer (B, c), c >= 1, the same prefix in every window; (B, height, width), cropped with it; or
            (B, height, width, c), for each window the prefix that stands at its upper left corner.
        height, width: of the grid, in tokens.
        window: the attention window's side in tokens; it is cut to the grid where the grid is smaller.
        schedule: "paper", "scene", "strided" or "block"; see `tamingfast.sampling.schedule`.
        stride: step of the window in tokens, for "strided" and "block".
        temperature, top_k, top_p: see `tamingfast.ops.choice.choose`.
        greedy: take the best token everywhere, without noise, temperature and filters.
        seed: 0 to 2**64 - 1. A token's noise depends on the seed, the image's number, row and column only.
        first_image: number of the batch's first image, so that a large run may be cut into any batches.
        start: integer (B, k), the first k tokens of the sequence, where one window covers the grid; or
            (B, height, width) together with `mask`.
        mask: bool (height, width) or (B, height, width); True samples, False keeps the token of `start`.
        backend: "native" is the extension's engine (on a CPU or a CUDA device), "torch" keeps a static key/value
            cache, "naive" is the paper's full forward pass per token, "auto" is the fastest that can run.
        dtype: weights' type during the pass: "float32", "bfloat16", "float16" (not by the CPU's engine), "int8" (by
            that engine only), or None for the model's own. Another type than the model's own works on a copy, and so
            does "native", which keeps its copy and its cache with the model until the weights change.
        memory: bytes for the keys and values of the windows that are open at once; with less, more is recomputed.
        callback: called as callback(done, total), in positions, after every `width` of them and at the end.
        observer: called as observer(tokens int64 (B, height, width), pending bool (B, height, width)) whenever tokens
            were added; `pending` is where they are still to come. It must not change them.

    Returns:
        int64 (B, height, width) on the transformer's device.

    Raises:
        UserError: an option outside its range, or a window that the transformer's block size cannot hold.
        ValueError: tensors of wrong shape or type, tokens outside the vocabulary, or logits with NaN.
    """
    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy, seed=seed)
    gpt, plan, cond, context, vocab = plan_grid(transformer, cond, height, width, window, schedule, stride)
    batch, device, prefix = len(cond), cond.device, context.length
    canvas, wanted = _canvas(start, mask, plan, batch, vocab, device)
    plan = plan.only(wanted.any(0).cpu().numpy())
    report = _Report(canvas, wanted, plan, callback, observer)
    chosen, dtype = choose_backend(backend, gpt, dtype)
    causal = gpt.config.n_unmasked <= prefix
    _check_images(first_image, batch)

    def noise(positions: np.ndarray) -> Iterator[Tensor | None]:
        drawn = _noise(seed, first_image, batch, positions, width, vocab, device)
        return itertools.repeat(None) if greedy else drawn

    def pick(logits: Tensor, drawn: Tensor | None) -> Tensor:
        return choose(logits[..., :vocab], drawn, temperature=temperature, top_k=top_k, top_p=top_p)

    # Windows that wait for nobody go together, where the cache of each is exact.
    waves = None
    if chosen != "naive" and causal and not plan.single_window:
        waves = plan_waves(gpt, plan, batch, prefix, memory)
    length = prefix + plan.window_tokens - 1
    shared = prefix if context.fixed else 0
    if waves is not None:
        slots = int(waves.slots.max(initial=-1)) + 1
        with _wave_engine(chosen, gpt, dtype, slots, batch, length) as runner:
            drawn = noise(waves.cells)
            sample_waves(runner, plan, waves, context, canvas, wanted, pick, drawn, gpt.config.n_unmasked, report.added)
    elif chosen == "native":
        images = range(first_image, first_image + batch)
        with engines.borrowed_engine(gpt, dtype, batch, length) as lent:
            decoder = NativeDecoder(lent, batch, shared, images, vocab, choice)
            _run_by_run(decoder, plan, context, canvas, wanted, report)
    else:
        with _evaluating(gpt, dtype) as model:
            decoder = _decoder(chosen, model, batch, plan, causal, length, shared)
            _one_by_one(decoder, plan, context, canvas, wanted, pick, noise(plan.positions()), report.added)
    return canvas.view(batch, height, width)


@contextmanager
def _wave_engine(
    chosen: str, gpt: nn.Module, dtype: str, slots: int, batch: int, length: int
) -> Iterator[NativeEngine | TorchEngine]:
    if chosen == "native":
        with engines.borrowed_engine(gpt, dtype, slots * batch, length) as lent:
            yield NativeEngine(lent, batch)
    else:
        with _evaluating(gpt, dtype) as model:
            yield TorchEngine(model, slots, batch, length)


def _run_by_run(
    decoder: NativeDecoder, plan: Schedule, context: Context, canvas: Tensor, wanted: Tensor, report: _Report
) -> None:
    """Samples into `canvas` by calls that decode a whole run; reports a row of tokens at a time."""
    every = plan.width if plan.height > 1 else REPORTED
    for run in plan.runs:
        places = plan.cells(run)
        cells = torch.from_numpy(places).to(canvas.device)
        sequence = torch.cat((context.before(run.row * plan.width + run.column), canvas[:, cells]), dim=1)
        prefix, reported = context.length, 0

        def tell(done: int, cells=cells, sequence=sequence, prefix=prefix, steps=run.steps) -> None:
            nonlocal reported
            canvas[:, cells] = sequence[:, prefix:]
            report.added(cells[torch.from_numpy(steps[reported:done])])
            reported = done

        rows, columns = divmod(places[run.steps], plan.width)
        steps, sampled = (prefix + run.steps).tolist(), wanted[:, cells[torch.from_numpy(run.steps)]]
        task = Task(sequence, steps, sampled, rows.tolist(), columns.tolist())
        decoder.decode(task, tell if report.listened_to else None, every)
        if reported < len(run.steps):
            tell(len(run.steps))


def plan_grid(
    transformer: nn.Module, cond: Tensor, height: int, width: int, window: int, schedule: str, stride: int
) -> tuple[nn.Module, Schedule, Tensor, Context, int]:
    """The GPT, the schedule, `cond` as int64 on its device, what it puts before windows, entries to choose from.

    Arguments and errors are those of `sample_grid`.
    """
    gpt, permutation, vocab = _parts(transformer)
    pyramid = getattr(transformer, "pyramid", None)
    if pyramid is not None:
        if (height, width) != (1, pyramid.tokens):
            raise UserError(
                f"a multiscale prior draws the {pyramid.tokens} tokens of its scales as one row, a grid of 1 x "
                f"{pyramid.tokens}, but got {height} x {width}: pass what its canvas_size gives"
            )
        window = pyramid.tokens
    plan = make_schedule(height, width, window, schedule, stride)
    if permutation is not None:
        plan = _permuted(plan, permutation)
    cond = _tokens("cond", cond, gpt.config.vocab_size, next(gpt.parameters()).device)
    shape = cond.shape[1:]
    if not shape or shape[-1] < 1 or (len(shape) > 1 and (shape[:2] != (height, width) or len(shape) > 3)):
        raise ValueError(
            f"cond has shape {tuple(cond.shape)}, but it must be (B, c >= 1), (B, {height}, {width}) or "
            f"(B, {height}, {width}, c >= 1)"
        )
    context = Context(cond, plan)
    _check_block_size(gpt, context.length, plan)
    return gpt, plan, cond, context, vocab


def _one_by_one(
    decoder: Decoder,
    plan: Schedule,
    context: Context,
    canvas: Tensor,
    wanted: Tensor,
    pick: Callable[[Tensor, Tensor | None], Tensor],
    noise: Iterator[Tensor | None],
    after_step: Callable[[Tensor], None],
) -> None:
    """Samples into `canvas` position by position; the arguments are those of `sample_waves`."""
    for run in plan.runs:
        cells = torch.from_numpy(plan.cells(run)).to(canvas.device)
        sequence = torch.cat((context.before(run.row * plan.width + run.column), canvas[:, cells]), dim=1)
        prefix, sampled = context.length, wanted[:, cells]
        decoder.enter(sequence)
        for step in run.steps.tolist():
            token = pick(decoder.logits(prefix + step), next(noise))
            token = torch.where(sampled[:, step], token, sequence[:, prefix + step])
            sequence[:, prefix + step] = canvas[:, cells[step]] = token
            after_step(cells[step : step + 1])


def _parts(transformer: nn.Module) -> tuple[nn.Module, np.ndarray | None, int]:
    """The GPT, the permuter's order (None: raster), and the number of entries an image token may take."""
    gpt = getattr(transformer, "transformer", transformer)
    order = getattr(getattr(transformer, "permuter", None), "forward_shuffle_idx", None)
    quantize = getattr(getattr(transformer, "first_stage_model", None), "quantize", None)
    codes = getattr(quantize, "re_embed", gpt.config.vocab_size)  # as many as are left after remapping
    return gpt, None if order is None else order.cpu().numpy(), min(codes, gpt.config.vocab_size)


def _permuted(plan: Schedule, order: np.ndarray) -> Schedule:
    if np.array_equal(order, np.arange(len(order))):
        return plan
    if not plan.single_window or len(order) != plan.window_tokens:
        raise UserError(
            f"the permuter orders {len(order)} tokens, so it can sample only as many in one window, "
            f"but the grid is {plan.height} x {plan.width} and the window {plan.window_height} x "
            f"{plan.window_width}"
        )
    return one_window(plan.height, plan.width, order)


def _check_block_size(gpt: nn.Module, prefix: int, plan: Schedule) -> None:
    needed = prefix + plan.window_tokens - 1
    if needed > gpt.config.block_size:
        raise UserError(
            f"{prefix} conditioning tokens and a window of {plan.window_height} x {plan.window_width} need a "
            f"block size of {needed}, but the transformer's is {gpt.config.block_size}: use a smaller window"
        )


def _tokens(name: str, value: Tensor, vocab: int, device: torch.device) -> Tensor:
    """`value` as int64 on the device, after a look at its type and range."""
    value = torch.as_tensor(value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {value.dtype}, but it must hold integer tokens")
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < vocab:
        low, high = int(value.min()), int(value.max())
        raise ValueError(f"{name} holds tokens from {low} to {high}, but they must lie in 0 to {vocab - 1}")
    return value.to(device, torch.int64)


def _canvas(
    start: Tensor | None, mask: Tensor | None, plan: Schedule, batch: int, vocab: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The grid before sampling, int64 (B, height * width), and where to sample, bool of the same shape."""
    grid = (batch, plan.height, plan.width)
    canvas = torch.zeros(batch, plan.height * plan.width, dtype=torch.int64, device=device)
    wanted = torch.ones_like(canvas, dtype=torch.bool)
    start = None if start is None else torch.as_tensor(start)
    if mask is not None:
        mask = torch.as_tensor(mask)
        if start is None or start.shape != grid:
            got = "None" if start is None else f"of shape {tuple(start.shape)}"
            raise ValueError(f"start is {got}, but a mask needs a start of shape {grid}")
        if mask.dtype != torch.bool or mask.shape not in (grid, grid[1:]):
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, but it must be bool {grid[1:]} or {grid}")
        wanted = mask.to(device).expand(grid).flatten(1)
        kept = start.to(device).masked_fill(wanted.view(grid), 0)  # what is resampled may hold anything
        canvas = _tokens("start", kept, vocab, device).flatten(1)
    elif start is not None:
        limit = plan.window_tokens if plan.single_window else 0
        if start.ndim != 2 or start.shape[0] != batch or start.shape[1] > limit:
            raise ValueError(
                f"start has shape {tuple(start.shape)}, but without a mask it must be ({batch}, k): the "
                f"first k of {limit} tokens, where one window covers the grid"
            )
        given = torch.from_numpy(plan.order[: start.shape[1]]).to(device)
        canvas[:, given] = _tokens("start", start, vocab, device)
        wanted[:, given] = False
    return canvas, wanted


class _Report:
    """Tells the callback and the observer of a call of `sample_grid` what has been sampled."""

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
        """The tokens at the raster indices `cells` are sampled."""
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


def _noise(
    seed: int, first_image: int, batch: int, positions: np.ndarray, width: int, vocab: int, device: torch.device
) -> Iterator[Tensor]:
    """Noise (B, vocab) for each of the raster indices `positions` of a grid of `width` columns, in turn."""
    images = torch.arange(first_image, first_image + batch, device=device)[:, None]
    chunks = torch.from_numpy(positions).to(device).split(max(1, NOISE_ENTRIES // max(1, batch * vocab)))
    drawn = (gumbel_noise(seed, images, part // width, part % width, vocab) for part in chunks)
    return (noise for chunk in drawn for noise in chunk.unbind(1))


def _check_images(first_image: int, batch: int) -> None:
    if not 0 <= first_image <= (1 << 32) - batch:
        raise UserError(f"first_image is {first_image}, but image numbers must lie in 0 to 2**32 - 1")


@contextmanager
def _evaluating(gpt: nn.Module, dtype: str) -> Iterator[nn.Module]:
    """The transformer in eval mode and the wanted type; what the caller handed in is as it was afterwards."""
    if getattr(torch, dtype) != next(gpt.parameters()).dtype:
        gpt = copy.deepcopy(gpt).to(getattr(torch, dtype))
    training = [module for module in gpt.modules() if module.training]
    gpt.eval()
    try:
        yield gpt
    finally:
        for module in training:
            module.training = True


def choose_backend(backend: str, gpt: nn.Module, dtype: str | None) -> tuple[str, str]:
    """The one place that chooses which engine samples: "native", "torch" or "naive", and its weights' type."""
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}, but it must be one of {', '.join(BACKENDS)}")
    name = str(next(gpt.parameters()).dtype if dtype is None else dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise UserError(f"dtype is {name!r}, but it must be one of {', '.join(DTYPES)}, or None")
    reason = engines.refusal(gpt)
    if reason is None and name not in engines.dtypes(gpt):
        reason = f"it has no {name} weights"
    if backend == "native" and reason is not None:
        raise UserError(f"backend 'native' cannot run here: {reason}")
    if backend == "auto" and backends.requested() == "reference":
        reason = "the torch reference was asked for"
    elif backend == "auto" and reason is not None and next(gpt.parameters()).is_cuda:
        _log_once(f"the torch backend samples, not the CUDA engine: {reason}")
    if backend == "native" or (backend == "auto" and reason is None):
        return "native", name
    if name == "int8":
        raise UserError(f"dtype 'int8' needs the native engine ({reason or f'backend is {backend}'}): use bfloat16")
    return "torch" if backend == "auto" else backend, name


def _decoder(
    chosen: str, gpt: nn.Module, batch: int, plan: Schedule, causal: bool, length: int, shared: int
) -> Decoder:
    if chosen == "naive":
        # Image tokens that attend in both directions would see what is not sampled yet in a whole window.
        return NaiveDecoder(gpt, whole_window=causal and not plan.single_window)
    if not causal:
        _log_once(
            f"The transformer attends in both directions over {gpt.config.n_unmasked} tokens, more than the "
            "conditioning has, so no key/value cache is exact and every token takes a full forward pass."
        )
        return NaiveDecoder(gpt, whole_window=False)
    return CachedDecoder(gpt, batch, length, shared)


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
