"""A training run of each stage that takes seconds, shared by the training tests and the processes they start."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

if TYPE_CHECKING:  # functions import the package themselves: test processes start with this file
    from tamingfast.training.vqgan import VQGANStage

SIZE = 8
VQGAN = {
    "model": {
        "base_learning_rate": 1e-4,
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 4,
            "n_embed": 16,
            "ddconfig": {
                "double_z": False, "z_channels": 4, "resolution": SIZE, "in_channels": 3, "out_ch": 3, "ch": 32,
                "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.1,
            },
            "lossconfig": {
                "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
                "params": {"disc_start": 0, "disc_num_layers": 1, "disc_ndf": 4, "perceptual_weight": 0.0},
            },
        },
    },
    "data": {"name": "photos", "size": SIZE},
    "training": {
        "steps": 6, "batch_size": 2, "log_every": 1, "validation_batches": 2, "checkpoint_every": 3,
        "validate_every": 6,
    },
}  # fmt: skip
PRIOR = {
    "model": {
        "base_learning_rate": 1e-3,
        "params": {
            "pkeep": 0.9,
            "transformer_config": {"params": {"n_layer": 1, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.1}},
        },
    },
    "prior": {"condition": "class"},
    "training": {
        "steps": 6, "batch_size": 2, "log_every": 1, "validation_batches": 2, "checkpoint_every": 3,
        "validate_every": 6,
    },
}  # fmt: skip


class Noise(Dataset):
    """Smooth random images with labels: item (epoch, index) is always the same."""

    classes = ("a", "b", "c")

    def __init__(self, count: int = 13, seed: int = 0, delay: float = 0.0):
        self.count, self.seed, self.delay, self.epoch = count, seed, delay, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        time.sleep(self.delay)
        generator = torch.Generator().manual_seed(self.seed * 10_000 + self.epoch * 100 + index)
        corner = torch.rand(1, 3, 2, 2, generator=generator) * 2 - 1
        image = torch.nn.functional.interpolate(corner, SIZE, mode="bilinear")[0].permute(1, 2, 0)
        return {"image": image, "class_label": index % 3, "file_path_": f"noise/{index}.png"}


def photographs(count: int, size: int) -> list[np.ndarray]:
    """Real images, uint8 (size, size, 3): crops of the packaged photographs, always the same."""
    from tamingfast import images
    from tamingfast.data import build

    crops = build({"name": "photos", "size": size, "seed": 0})[0]
    rows = [crops[index]["image"].permute(2, 0, 1) for index in range(count)]
    return list(images.to_uint8(torch.stack(rows)))


def datasets(delay: float = 0.0) -> tuple[Dataset, Dataset]:
    """(training, validation)."""
    return Noise(13, 0, delay), Noise(5, 1)


def images(count: int = 4) -> dict[str, torch.Tensor]:
    """A batch of the first images."""
    data = Noise(count)
    return {"image": torch.stack([data[i]["image"] for i in range(count)])}


def config(base: dict[str, Any], model: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    """A copy of ``base`` with some ``training`` settings and ``model.params`` replaced."""
    made = copy.deepcopy(base)
    made["training"] |= training
    made["model"]["params"] |= model or {}
    return made


def build(described: dict[str, Any]) -> nn.Module:
    """The model of a config, with weights from torch's generator."""
    from tamingfast.checkpoints.config import instantiate_from_config

    return instantiate_from_config({key: described["model"][key] for key in ("target", "params")})


def vqgan_stage(loss: dict[str, Any] | None = None, shared: bool = False, **params: Any) -> VQGANStage:
    """A stage in training mode, without dropout; ``loss`` are parameters of its loss, ``params`` of its model."""
    from tamingfast.training.vqgan import VQGANStage

    made = config(VQGAN, params)
    made["model"]["params"]["ddconfig"]["dropout"] = 0.0
    made["model"]["params"]["lossconfig"]["params"] |= loss or {}
    torch.manual_seed(0)
    return VQGANStage(build(made).train(), 1e-3, shared)


def move(
    stage: VQGANStage, batches: list[dict[str, torch.Tensor]], **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One optimizer step: the values that it records, and copies of the parameters after it."""
    from tamingfast.training.step import step

    values = step(stage.optimizers, stage.loss, batches, **options)
    return values, {name: value.detach().clone() for name, value in stage.model.named_parameters()}


def train(
    stage: str, out: Path, first_stage: Path | None = None, resume: bool = False, delay: float = 0.0, **training: Any
) -> Path:
    """Train "vqgan" or "prior" on one thread of the CPU."""
    from tamingfast.training import prior, vqgan

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if stage == "vqgan":
            return vqgan.train(config(VQGAN, **training), out, resume, "cpu", datasets(delay))
        return prior.train(config(PRIOR, **training), first_stage, out, resume, "cpu", datasets(delay))
    finally:
        torch.set_num_threads(threads)


#: Crops of 8x8 of the packaged photographs.
CROPS = {"name": "photos", "size": SIZE, "length": 16}


def runs(folder: Path) -> Path:
    """``folder`` with three runs on `CROPS`: vqgan (f = 2), an unconditional prior on it, prior_pixels on colours."""
    from tamingfast.data import build
    from tamingfast.training import prior, vqgan
    from tamingfast.training.colors import fit_color_clusters

    vqgan.train(config(VQGAN, steps=4) | {"data": CROPS}, folder / "vqgan", device="cpu")
    settings = config(PRIOR, steps=2) | {"data": CROPS, "prior": {"condition": "none"}}
    prior.train(settings, folder / "vqgan", folder / "prior", device="cpu")
    fit_color_clusters(build(CROPS)[0], 8, 0, folder / "colors", CROPS)
    prior.train(settings, folder / "colors", folder / "prior_pixels", device="cpu")
    return folder


if __name__ == "__main__":
    # Arguments: stage, directory, first stage or "-", steps. A slow run in its own process, for tests that stop it.
    stage, out, first_stage, steps = sys.argv[1:]
    try:
        train(
            stage,
            Path(out),
            None if first_stage == "-" else Path(first_stage),
            delay=0.02,
            steps=int(steps),
            checkpoint_every=5,
        )
    except ValueError as error:
        sys.exit(f"{type(error).__name__}: {error}")
