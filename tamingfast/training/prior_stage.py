"""What is trained of a prior: a transformer with its AdamW on the tokens of a frozen first stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.data.conditions import SPATIAL_KEYS, TOKEN_KEYS, Objects, label_colors
from tamingfast.models.multiscale import MultiscaleTransformer
from tamingfast.models.prior import TOP_K, Net2NetTransformer
from tamingfast.training.stage import Batch, Loss, optimizers_of
from tamingfast.training.tokens import tokens_of

#: Nats per token above which exp overflows a double.
_MOST_NATS = 700.0


def perplexity(nats: float) -> float:
    """exp of the cross entropy per token, capped where it would overflow a double."""
    return math.exp(min(nats, _MOST_NATS))


def _nats(model: Net2NetTransformer, z: Tensor, c: Tensor) -> Tensor:
    logits = model.token_logits(z, c)
    return F.cross_entropy(logits.transpose(1, 2).float(), z, reduction="none")


class _Nats(nn.Module):
    """Image tokens (B, n) and condition tokens (B, c) -> the cross entropy of each image token (B, n), in nats."""

    def __init__(self, model: Net2NetTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return _nats(self.model, z, c)


class PriorStage:
    """A `Net2NetTransformer` with its AdamW.

    ``grid`` is tokens (rows, columns) of an image; ``objects`` draws the conditions of a prior on objects. ``network``
    is what a training step runs, which several processes wrap; see `tamingfast.training.parallel`. ``sampling`` are
    settings of `tamingfast.sampling.sample_grid` for the samples that it shows.
    """

    shown: tuple[str, ...] = ("loss", "nll", "perplexity")

    def __init__(
        self,
        model: Net2NetTransformer,
        learning_rate: float,
        grid: tuple[int, int],
        seed: int = 0,
        objects: Objects | None = None,
        sampling: Mapping[str, Any] | None = None,
    ):
        self.model, self.grid, self.seed, self.objects = model, grid, seed, objects
        self.sampling = {"top_k": TOP_K, **(sampling or {})}
        self.network: nn.Module = _Nats(model)
        model.learning_rate = learning_rate
        self.optimizers = optimizers_of(model)

    @property
    def averaged(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.model.named_parameters() if name.startswith("transformer.")}

    def nats(self, batch: Batch) -> Tensor:
        """Cross entropy of each image token of the batch, in nats: (B, n) in the model's sequence."""
        return _nats(self.model, *tokens_of(self.model, batch))

    def nll(self, batch: Batch) -> Tensor:
        """Mean cross entropy of the batch's image tokens, nats per token ()."""
        return self.nats(batch).mean()

    def loss(self, batch: Batch, index: int) -> Loss:
        value = self.network(*tokens_of(self.model, batch)).mean()
        return value, {"loss": value}

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean cross entropy in nats per token, and its exponential; for a multiscale prior also per scale."""
        total, images = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            nats = self.nats(batch).double()
            total, images = total.to(nats.device) + nats.sum(0), images + len(nats)
        mean = total / images  # (n,)
        nll = float(mean.mean())
        values = {"nll": nll, "perplexity": perplexity(nll)}
        if isinstance(self.model, MultiscaleTransformer):
            pyramid = self.model.pyramid
            scales = zip(pyramid.names, pyramid.split(mean), strict=True)
            values |= {f"nll_{name}": float(scale.mean()) for name, scale in scales}
        return values

    def images(self, batch: Batch) -> list[Tensor]:
        """The batch's conditions if they can be shown, its tokens decoded, and samples under its conditions."""
        z, c = tokens_of(self.model, batch)
        height, width = self.grid
        shown = self.model.decode_grid(self.model.to_grid(z, height, width))
        samples = self.model.sample_images(
            c,
            height,
            width,
            window=max(height, width),
            seed=self.seed,
            **self.sampling,
        )
        return [*self.conditioning(batch), shown, samples]

    def conditioning(self, batch: Batch) -> list[Tensor]:
        """The batch's conditions as a list of one (B, 3, H, W) in [-1, 1], empty if they cannot be shown."""
        key = self.model.cond_stage_key
        if key in TOKEN_KEYS.values() and self.objects is not None:
            shape = batch[self.model.first_stage_key].shape[1:3]
            drawn = np.stack([self.objects.picture_of_tokens(tokens, shape) for tokens in batch[key].cpu().numpy()])
            return [torch.from_numpy(drawn).permute(0, 3, 1, 2)]
        if key not in SPATIAL_KEYS:
            return []
        if key in batch:
            c = self.model.get_input(key, batch)
        else:
            c = self.model.decode_condition(batch[f"{key}_indices"].view(-1, *self.grid)).clamp(-1, 1)
        if key == "segmentation":
            colors = torch.from_numpy(label_colors(c.shape[1])).to(c.device)
            return [colors[c.argmax(1)].permute(0, 3, 1, 2)]
        return [(2 * c - 1 if key == "coord" else c).expand(-1, 3, -1, -1)]
