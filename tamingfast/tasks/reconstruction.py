"""What a model makes of real images, in figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast.engines import bands
from tamingfast.sampling.likelihood import negative_log_likelihood, tokens_per_token
from tamingfast.tasks.drawing import painted, photo_canvas
from tamingfast.tasks.models import first_stage_of


@torch.no_grad()
def reconstruct(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Images (B, 3, H, W) through the first stage, and how far the result is from them.

    Large ones in bands of rows, as `tamingfast.engines.bands` has it.
    Figures: ``l1`` mean absolute difference (images in [-1, 1]), ``psnr`` in dB, ``codes`` different codes in use.
    """
    stage = first_stage_of(model)
    tokens = bands.encode_grid(stage, x)
    out = bands.decode_grid(stage, tokens).clamp(-1, 1)
    mse = float((out - x).square().mean())
    psnr = 10 * float(np.log10(4 / mse)) if mse > 0 else float("inf")
    return out, {"l1": float((out - x).abs().mean()), "psnr": psnr, "codes": int(tokens.unique().numel())}


@torch.no_grad()
def likelihood(
    model: nn.Module,
    x: Tensor,
    cond: Tensor,
    strides: Sequence[int] = (8,),
    batch: int = 4,
    progress: Callable[[int, int], Any] | None = None,
) -> list[dict[str, Any]]:
    """What each schedule costs on images (B, 3, H, W): a row each with ``name``, ``nats`` and ``tokens_per_token``.

    ``cond`` are condition tokens (B, c) or (B, rows, columns).
    ``nats`` is the mean over tokens and images of `tamingfast.sampling.likelihood.negative_log_likelihood`.
    """
    canvas = painted(model, photo_canvas(model, x, cond))
    _, rows, columns = canvas.tokens.shape
    window = canvas.settings["window"]
    prefix = cond.shape[-1] if cond.ndim != 3 else min(window, rows) * min(window, columns)
    rules = [("paper", 1), ("scene", 1), *((rule, stride) for rule in ("strided", "block") for stride in strides)]
    found = []
    for done, (rule, stride) in enumerate(rules):
        options = dict(window=window, schedule=rule, stride=stride)
        parts = zip(cond.split(batch), canvas.tokens.split(batch), strict=True)
        nats = torch.cat([negative_log_likelihood(model, *part, **options) for part in parts])
        work = tokens_per_token(rows, columns, prefix, **options)
        name = rule if rule in ("paper", "scene") else f"{rule} {stride}"
        found.append({"name": name, "nats": float(nats.mean()), "tokens_per_token": work})
        if progress is not None:
            progress(done + 1, len(rules))
    return found
