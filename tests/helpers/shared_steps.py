"""Steps of a first stage in float64, of which each process computes a part, and the losses over all of them."""

from __future__ import annotations

import functools
from typing import Any

import tiny
import torch

from tamingfast.ranks import World, alone
from tamingfast.training.parallel import Averaged
from tamingfast.training.step import step

STEPS, IMAGES = 40, 6
#: Losses with a discriminator of each kind.
KINDS: dict[str, dict[str, Any]] = {
    "batch norm": {},
    "act norm": {"use_actnorm": True, "lecam_weight": 0.01, "disc_loss": "non_saturating"},
}


def losses(rank: int, kind: str) -> list[dict[str, float]]:
    """The values of each step, means over the images of all processes."""
    among = World(rank, 1 if alone() else torch.distributed.get_world_size(), torch.device("cpu"))
    stage = tiny.vqgan_stage(KINDS[kind])
    stage.model.double()  # in place: the optimizers keep their parameters
    stage.model.get_input = lambda batch, key: batch[key].movedim(-1, 1).double()  # type: ignore[method-assign]
    averaging, data, own, found = Averaged(among).averaging, tiny.Noise(IMAGES), IMAGES // among.size, []
    for number in range(STEPS):
        data.set_epoch(number)
        stage.model.global_step = number
        batch = {"image": torch.stack([data[rank * own + i]["image"] for i in range(own)])}
        values = step(stage.optimizers, stage.loss, [batch], averaging=averaging)
        found.append(among.mean(values))
    return found


batch_norm = functools.partial(losses, kind="batch norm")
act_norm = functools.partial(losses, kind="act norm")
