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

from tamingfast import backends, engine
from tamingfast.errors import UserError
from tamingfast.sampling.decoders import CachedDecoder, Decoder, NaiveDecoder, NativeDecoder, Task
from tamingfast.sampling.filters import check_filters, check_seed, choose, gumbel_noise
from tamingfast.sampling.schedule import Schedule, make_schedule, one_window

BACKENDS = ("auto", "native", "torch", "naive")
DTYPES = ("float32", "bfloat16", "float16", "int8")
#: Drawn at a time: enough to hide the generator's launches, few enough to stay below 64 MiB.
NOISE_ENTRIES = 1 << 20

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
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Samples the image tokens of a batch of grids, one after the other inside sliding windows.

    A window's sequence is its conditioning followed by its image tokens without the last; the logits of
    image token i stand at index c - 1 + i. Source: Esser et al. 2021, section 3.3 and figure 3.

    Args:
        transformer: a `GPT`, or a `Net2NetTransformer`: then its permuter gives the token order (one window
            only; noise stays keyed by the true row and column), and entries beyond the first stage's codebook
            are never chosen.
        cond: integer (B, c), c >= 1, the same prefix in every window; or (B, height, width), cropped with it.
        height, width: of the grid, in tokens.
        window: the attention window's side in tokens; it is cut to the grid where the grid is smaller.
        schedule: "paper", "scene", "strided" or "block"; see `tamingfast.sampling.schedule`.
        stride: step of the window in tokens, for "strided" and "block".
        temperature, top_k, top_p: see `tamingfast.sampling.filters.choose`.
        greedy: take the best token everywhere, without noise, temperature and filters.
        seed: 0 to 2**64 - 1. A token's noise depends on the seed, the image's number, row and column only.
        first_image: number of the batch's first image, so that a large run may be cut into any batches.
        start: integer (B, k), the first k tokens of the sequence, where one window covers the grid; or
            (B, height, width) together with `mask`.
        mask: bool (height, width) or (B, height, width); True samples, False keeps the token of `start`.
        backend: "native" is the engine in C++ (CPU), "torch" keeps a static key/value cache, "naive" is the paper's
            full forward pass per token, "auto" is the fastest that can run.
        dtype: weights' type during the pass: "float32", "bfloat16", "float16", "int8" (native only), or None for
            the model's own. Another type than the model's own works on a copy, and so does "native", which keeps
            its copy and its cache with the model until the weights change.
        callback: called as callback(done, total), in positions, after every `width` of them and at the end.

    Returns:
        int64 (B, height, width) on the transformer's device.

    Raises:
        UserError: an option outside its range, or a window that the transformer's block size cannot hold.
        ValueError: tensors of wrong shape or type, tokens outside the vocabulary, or logits with NaN.
    """
    check_filters(temperature, top_k, top_p)
    check_seed(seed)
    gpt, permutation, vocab = _parts(transformer)
    plan = make_schedule(height, width, window, schedule, stride)
    if permutation is not None:
        plan = _permuted(plan, permutation)
    device = next(gpt.parameters()).device
    cond = _tokens("cond", cond, gpt.config.vocab_size, device)
    shape = cond.shape[1:]
    fixed = len(shape) == 1
    if not (fixed and shape[0] >= 1) and shape != (height, width):
        raise ValueError(f"cond has shape {tuple(cond.shape)}, but it must be (B, c >= 1) or (B, {height}, {width}).")
    batch, prefix = cond.shape[0], shape[0] if fixed else plan.window_tokens
    _check_block_size(gpt, prefix, plan)
    canvas, wanted = _canvas(start, mask, plan, batch, vocab, device)
    plan = plan.only(wanted.any(0).cpu().numpy())
    choice = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    _check_images(first_image, batch)
    chosen, dtype = _backend(backend, gpt, dtype)
    if chosen == "native":
        images = range(first_image, first_image + batch)
        choice |= dict(images=images, choices=vocab, greedy=greedy, seed=int(seed))
        room = prefix + plan.window_tokens - 1
        with engine.borrowed_engine(gpt, dtype, batch, room) as lent:
            decoder = NativeDecoder(lent, batch, prefix if fixed else 0, choice)
            _drive(decoder.decode, plan, cond, canvas, wanted, callback)
    else:
        noise = itertools.repeat(None) if greedy else _noise(seed, first_image, batch, plan, vocab, device)
        with _evaluating(gpt, dtype) as model:
            decoder = _decoder(chosen, model, batch, prefix, plan, shared=prefix if fixed else 0)
            _drive(functools.partial(_decode, decoder, vocab, noise, choice), plan, cond, canvas, wanted, callback)
    return canvas.view(batch, height, width)


def _drive(
    decode: Callable[[Task, Callable[[int], None] | None, int], None],
    plan: Schedule,
    cond: Tensor,
    canvas: Tensor,
    wanted: Tensor,
    callback: Callable[[int, int], None] | None,
) -> None:
    """Fills the canvas in place, a task for each run of the plan."""
    done, total = 0, sum(len(run.steps) for run in plan.runs)
    report = None if callback is None else lambda count: callback(count, total)
    for run in plan.runs:
        cells = torch.from_numpy(plan.cells(run)).to(canvas.device)
        # A conditioning grid is cropped in raster order whatever the order of the image tokens.
        context = cond if cond.ndim == 2 else cond.flatten(1)[:, cells.sort().values]
        sequence, prefix = torch.cat((context, canvas[:, cells]), dim=1), context.shape[1]
        places = cells[run.steps]
        rows, columns = (places // plan.width).tolist(), (places % plan.width).tolist()
        steps = (prefix + run.steps).tolist()
        decode(Task(sequence, steps, wanted[:, places], rows, columns, done), report, plan.width)
        canvas[:, cells] = sequence[:, prefix:]
        done += len(run.steps)
    if report is not None and total % plan.width:
        report(total)


def _decode(
    decoder: Decoder,
    vocab: int,
    noise: Iterator[Tensor | None],
    choice: dict,
    task: Task,
    report: Callable[[int], None] | None,
    every: int,
) -> None:
    """Does a task with a torch backend; `noise` yields that of each step, in decoding order."""
    decoder.enter(task.sequence)
    for i, step in enumerate(task.steps):
        token = choose(decoder.logits(step)[:, :vocab], next(noise), **choice)
        task.sequence[:, step] = torch.where(task.wanted[:, i], token, task.sequence[:, step])
        if report is not None and (task.before + i + 1) % every == 0:
            report(task.before + i + 1)


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
            f"The permuter orders {len(order)} tokens, so it can sample only as many in one window, "
            f"but the grid is {plan.height} x {plan.width} and the window {plan.window_height} x "
            f"{plan.window_width}."
        )
    return one_window(plan.height, plan.width, order)


def _check_block_size(gpt: nn.Module, prefix: int, plan: Schedule) -> None:
    needed = prefix + plan.window_tokens - 1
    if needed > gpt.config.block_size:
        raise UserError(
            f"{prefix} conditioning tokens and a window of {plan.window_height} x {plan.window_width} need a "
            f"block size of {needed}, but the transformer's is {gpt.config.block_size}: use a smaller window."
        )


def _tokens(name: str, value: Tensor, vocab: int, device: torch.device) -> Tensor:
    """`value` as int64 on the device, after a look at its type and range."""
    value = torch.as_tensor(value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {value.dtype}, but it must hold integer tokens.")
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < vocab:
        low, high = int(value.min()), int(value.max())
        raise ValueError(f"{name} holds tokens from {low} to {high}, but they must lie in 0 to {vocab - 1}.")
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
            raise ValueError(f"start is {got}, but a mask needs a start of shape {grid}.")
        if mask.dtype != torch.bool or mask.shape not in (grid, grid[1:]):
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, but it must be bool {grid[1:]} or {grid}.")
        wanted = mask.to(device).expand(grid).flatten(1)
        kept = start.to(device).masked_fill(wanted.view(grid), 0)  # what is resampled may hold anything
        canvas = _tokens("start", kept, vocab, device).flatten(1)
    elif start is not None:
        limit = plan.window_tokens if plan.single_window else 0
        if start.ndim != 2 or start.shape[0] != batch or start.shape[1] > limit:
            raise ValueError(
                f"start has shape {tuple(start.shape)}, but without a mask it must be ({batch}, k): the "
                f"first k of {limit} tokens, where one window covers the grid."
            )
        given = torch.from_numpy(plan.order[: start.shape[1]]).to(device)
        canvas[:, given] = _tokens("start", start, vocab, device)
        wanted[:, given] = False
    return canvas, wanted


def _check_images(first_image: int, batch: int) -> None:
    if not 0 <= first_image <= (1 << 32) - batch:
        raise UserError(f"first_image is {first_image}, but image numbers must lie in 0 to 2**32 - 1.")


def _noise(
    seed: int, first_image: int, batch: int, plan: Schedule, vocab: int, device: torch.device
) -> Iterator[Tensor]:
    """Noise (B, vocab) for each position of the plan, in decoding order."""
    images = torch.arange(first_image, first_image + batch, device=device)[:, None]
    positions = torch.from_numpy(plan.positions()).to(device)
    chunks = positions.split(max(1, NOISE_ENTRIES // max(1, batch * vocab)))
    drawn = (gumbel_noise(seed, images, part // plan.width, part % plan.width, vocab) for part in chunks)
    return (noise for chunk in drawn for noise in chunk.unbind(1))


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


def _backend(backend: str, gpt: nn.Module, dtype: str | None) -> tuple[str, str]:
    """The one place that chooses which engine samples: "native", "torch" or "naive", and its weights' type."""
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}, but it must be one of {', '.join(BACKENDS)}.")
    name = str(next(gpt.parameters()).dtype if dtype is None else dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise UserError(f"dtype is {name!r}, but it must be one of {', '.join(DTYPES)}, or None.")
    reason = engine.refusal(gpt)
    if reason is None and name not in engine.DTYPES:
        reason = f"it has no {name} weights"
    if backend == "native" and reason is not None:
        raise UserError(f"backend 'native' cannot run here: {reason}.")
    if reason is None and backend == "auto" and backends.requested() == "reference":
        reason = "the torch reference was asked for"
    if backend == "native" or (backend == "auto" and reason is None):
        return "native", name
    if name == "int8":
        raise UserError(f"dtype 'int8' needs the native engine ({reason or f'backend is {backend}'}): use bfloat16.")
    return "torch" if backend == "auto" else backend, name


def _decoder(backend: str, gpt: nn.Module, batch: int, prefix: int, plan: Schedule, shared: int) -> Decoder:
    causal = gpt.config.n_unmasked <= prefix
    if backend == "naive":
        # Image tokens that attend in both directions would see what is not sampled yet in a whole window.
        return NaiveDecoder(gpt, whole_window=causal and not plan.single_window)
    if not causal:
        _log_once(
            f"The transformer attends in both directions over {gpt.config.n_unmasked} tokens, more than the "
            f"{prefix} of the conditioning, so no key/value cache is exact and every token takes a full "
            f"forward pass."
        )
        return NaiveDecoder(gpt, whole_window=False)
    return CachedDecoder(gpt, batch, prefix + plan.window_tokens - 1, shared)


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)
