"""What a schedule costs: the likelihood that a model gives to real images when it sees them through its windows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.sampling.sampler import plan_grid
from tamingfast.sampling.schedule import make_schedule, make_waves

#: Tokens per forward pass.
TOKENS_PER_CALL = 8192


@torch.no_grad()
def negative_log_likelihood(
    transformer: nn.Module,
    cond: Tensor,
    tokens: Tensor,
    *,
    window: int = 16,
    schedule: str = "paper",
    stride: int = 8,
) -> Tensor:
    """Nats of each token of real images, given the true tokens before it in the window that the schedule gives it.

    Args:
        transformer, cond, window, schedule, stride: as in `sample_grid`.
        tokens: int64 (B, height, width).

    Returns:
        float32 (B, height, width). Its mean is the cross entropy per token; exp of its sum is the likelihood of an
        image under the sampler, as every token is conditioned only on tokens that are sampled before it.

    Raises:
        UserError, ValueError: as `sample_grid`.
    """
    batch, height, width = tokens.shape
    gpt, plan, cond, context, vocab = plan_grid(transformer, cond, height, width, window, schedule, stride)
    flat = tokens.to(cond.device).flatten(1)
    prefix = context.length
    raster = torch.from_numpy(plan.offsets.copy()).to(cond.device)
    out = torch.zeros(batch, height * width, device=cond.device)
    positions = plan.positions()
    positions = positions[np.argsort(plan.corners[positions], kind="stable")]
    corners, first = np.unique(plan.corners[positions], return_index=True)
    groups = np.split(positions, first[1:])
    at_once = max(1, TOKENS_PER_CALL // (batch * (prefix + plan.window_tokens)))
    for begin in range(0, len(corners), at_once):
        part = slice(begin, begin + at_once)
        corner = torch.from_numpy(corners[part]).to(cond.device)[:, None]
        longest = max(int(plan.steps[group].max()) for group in groups[part])
        image = flat[:, corner + raster[:longest]]  # (B, windows, longest)
        logits = gpt(torch.cat((context.before(corner), image), 2).flatten(0, 1))[0][:, prefix - 1 :, :vocab]
        logits = logits.view(batch, len(corner), longest + 1, -1)
        for i, group in enumerate(groups[part]):
            cells = torch.from_numpy(group).to(cond.device)
            predicted = logits[:, i, torch.from_numpy(plan.steps[group]).to(cond.device)]
            out[:, cells] = F.cross_entropy(predicted.float().transpose(1, 2), flat[:, cells], reduction="none")
    return out.view(batch, height, width)


def tokens_per_token(
    height: int, width: int, prefix: int, window: int = 16, schedule: str = "paper", stride: int = 8
) -> float:
    """Tokens that pass through the transformer for each one sampled, with as many cache slots as are of use."""
    waves = make_waves(make_schedule(height, width, window, schedule, stride))
    return waves.tokens_fed(prefix) / (height * width)
