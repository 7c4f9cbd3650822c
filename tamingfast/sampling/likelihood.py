"""The likelihood of real images under a schedule, that is, when the model sees them through its windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tamingfast.sampling.plan import Sampled, plan_grid
from tamingfast.sampling.schedule import make_schedule, make_waves
from tamingfast.sampling.waves import TOKENS_PER_CALL


@torch.no_grad()
def negative_log_likelihood(
    transformer: Sampled,
    cond: Tensor,
    tokens: Tensor,
    *,
    window: int = 16,
    schedule: str = "paper",
    stride: int = 8,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Negative log-likelihood of each token of real images, in nats, given the true tokens before it in its window.

    Args:
        transformer, cond, window, schedule, stride: as in `sample_grid`.
        tokens: int64 (B, height, width).
        progress: called with the number of tokens scored since the last call.

    Returns:
        float32 (B, height, width). Its mean is the cross entropy per token; exp of its sum is the likelihood of an
        image under the sampler, as every token is conditioned only on tokens that are sampled before it.

    Raises:
        UserError, ValueError: as `sample_grid` does.
    """
    batch, height, width = tokens.shape
    plan = plan_grid(transformer, cond, height, width, window, schedule, stride)
    layout, device, prefix = plan.schedule, plan.device, plan.context.length
    flat = tokens.to(device).flatten(1)
    raster = torch.from_numpy(layout.offsets.copy()).to(device)
    out = torch.zeros(batch, height * width, dtype=torch.float32, device=device)
    cells = layout.positions()
    cells = cells[np.argsort(layout.corners[cells], kind="stable")]
    corners, first = np.unique(layout.corners[cells], return_index=True)
    groups = np.split(cells, first[1:])
    at_once = max(1, TOKENS_PER_CALL // (batch * (prefix + layout.window_tokens)))
    for begin in range(0, len(corners), at_once):
        part = slice(begin, begin + at_once)
        corner = torch.from_numpy(corners[part]).to(device)[:, None]
        longest = max(int(layout.steps[group].max()) for group in groups[part])
        image = flat[:, corner + raster[:longest]]  # (B, windows, longest)
        sequences = torch.cat((plan.context.before(corner), image), 2).flatten(0, 1)
        logits = plan.gpt(sequences)[0][:, prefix - 1 :, : plan.vocab].view(batch, len(corner), longest + 1, -1)
        for i, group in enumerate(groups[part]):
            scored = torch.from_numpy(group).to(device)
            predicted = logits[:, i, torch.from_numpy(layout.steps[group]).to(device)]
            out[:, scored] = F.cross_entropy(predicted.float().transpose(1, 2), flat[:, scored], reduction="none")
        if progress is not None:
            progress(batch * sum(map(len, groups[part])))
    return out.view(batch, height, width)


def tokens_per_token(
    height: int, width: int, prefix: int, window: int = 16, schedule: str = "paper", stride: int = 8
) -> float:
    """Tokens that pass through the transformer per sampled token, with an unlimited number of cache slots."""
    waves = make_waves(make_schedule(height, width, window, schedule, stride))
    return waves.tokens_fed(prefix) / (height * width)
