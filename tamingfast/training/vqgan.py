"""The first stage's training: paper section 3.1, in the steps of the original under Lightning."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tamingfast.checkpoints.config import instantiate_from_config, plain
from tamingfast.errors import UserError
from tamingfast.models.quantize import VectorQuantizer
from tamingfast.training import distributed, feed, loop
from tamingfast.training.settings import build_datasets, check_stage, training_settings

#: In eval mode the losses know no adaptive weight, so these say nothing about the model.
_MEANINGLESS_IN_VALIDATION = ("d_weight", "disc_factor", "aeloss", "total_loss")


def train(
    config: Mapping[str, Any],
    out: str | os.PathLike,
    resume: bool = False,
    device: str | torch.device | None = None,
    datasets: tuple[Dataset, Dataset | None] | None = None,
) -> Path:
    """Train the first stage that ``config`` describes into the run directory ``out``; returns it.

    ``config`` is a mapping as `tamingfast.training.load_config` gives; ``datasets`` (training, validation) replaces
    its ``data:`` section. ``resume`` continues from the state in ``out``, bit for bit on CPU.

    Raises UserError for a config or data that cannot be trained on, when training diverges, and as `loop.Stopped` when
    the process is asked to stop.
    """
    config, out = dict(plain(config)), Path(out)
    settings, described = training_settings(config), config.get("model") or {}
    check_stage(config, prior=False)
    with distributed.world(device) as among:
        datasets = datasets or build_datasets(config)
        lr = loop.learning_rate(settings, described.get("base_learning_rate"), among.size)
        torch.manual_seed(feed.key(settings.seed, "weights"))
        model = instantiate_from_config({key: described[key] for key in ("target", "params") if key in described})
        feed.grid_of(datasets[0], model, model.image_key)  # fails for images that the model cannot give back
        stage = VQGANStage(model.to(among.device), lr, settings.shared_forward)
        loop.prepare(config, out, resume, settings, datasets[0], among, stage)
        if settings.codebook_from_data:
            # Every process reads the same batches, as if alone, and so gets the same codebook.
            alone = distributed.World(0, 1, among.device)
            start_codebook(model, feed.step_batches(datasets[0], settings, alone, 0), settings.seed)
        return loop.run(stage, settings, datasets, out, among, resume)


@torch.no_grad()
def start_codebook(model: nn.Module, batches: Iterator[tuple[int, list[Mapping[str, Any]]]], seed: int) -> None:
    """Set each codebook to latents of the untrained encoder, drawn from the first training batches.

    The original starts it within 1/n_embed of zero, from where short runs reach few codes. Takes batches until there
    are four latents for each code. Of two codebooks the second starts from latents that follow from the first. Raises
    UserError for a quantiser whose codebook does not start from a table.
    """
    quantizers = [module for module in model.quantize.modules() if isinstance(module, VectorQuantizer)]
    if not quantizers:
        raise UserError(f"training.codebook_from_data does not apply to {type(model).__name__}; leave it false")
    taken: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        yield from taken
        while True:
            for batch in next(batches)[1]:
                taken.append(model.get_input(batch, model.image_key))
                yield taken[-1]

    for quantizer in quantizers:
        codebook, found = quantizer.embedding.weight, []
        hook = quantizer.register_forward_pre_hook(
            lambda module, inputs, found=found: found.append(inputs[0].movedim(1, -1).flatten(0, -2))
        )
        try:
            for x in images():
                model.encode(x)
                if sum(map(len, found)) >= 4 * len(codebook):
                    break
        finally:
            hook.remove()
        rows = torch.cat(found)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(feed.key(seed, "codebook")))
        codebook.copy_(rows[order[: len(codebook)].to(rows.device)])


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    """What ``configure_optimizers`` gives, in each of the forms that Lightning allows, as a list."""
    found = model.configure_optimizers()
    if isinstance(found, tuple):
        found = found[0]
    return list(found) if isinstance(found, list) else [found]


def logged(model: nn.Module, split: str) -> dict[str, Tensor]:
    """What the model has logged under ``split/`` (or under no split), without that prefix, as tensors ()."""
    names = {name.removeprefix(f"{split}/"): value for name, value in model.logged.items()}
    return {name: torch.as_tensor(value).detach().float().mean() for name, value in names.items()}


class VQGANStage:
    """Any first stage of ours with one optimizer (segmentation) or two (autoencoder, discriminator).

    With ``shared_forward`` the discriminator learns from the reconstructions that the autoencoder was just trained on,
    instead of new ones, and rests until ``disc_start``: one pass through encoder and decoder less. That is not the
    original's schedule, under which the discriminator meets what the autoencoder has become by its step.
    """

    shown = ("aeloss", "discloss", "rec_loss", "codebook_usage", "codebook_perplexity")

    def __init__(self, model: nn.Module, learning_rate: float, shared_forward: bool = False):
        self.model = model
        model.learning_rate = learning_rate
        self.optimizers = optimizers_of(model)
        self._shares = shared_forward and len(self.optimizers) == 2
        self._seen: tuple[Tensor, Tensor] | None = None
        if getattr(model.loss, "perceptual_weight", 0) > 0:
            _ = model.loss.perceptual_loss  # built on first use, which must not fall into the middle of a step

    def loss(self, batch: Mapping[str, Any], index: int) -> loop.Loss:
        if index == 1 and self._shares and self.model.global_step < self.model.loss.discriminator_iter_start:
            return None
        self.model.logged.clear()
        with self._reusing(index):
            value = self.model.training_step(batch, 0, index)
        return value, logged(self.model, "train")

    @contextmanager
    def _reusing(self, index: int) -> Iterator[None]:
        """With a shared forward pass: keep what the model returns to the first loss, and return it to the second."""
        if not self._shares:
            yield
            return
        if index == 0:

            def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
                self._seen = tuple(part.detach() for part in output)

            handle = self.model.register_forward_hook(keep)
            try:
                yield
            finally:
                handle.remove()
        else:
            self.model.forward = lambda x: self._seen
            try:
                yield
            finally:
                del self.model.forward
                self._seen = None

    def validate(self, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Means of what the model logs for validation, and how the codebook is used."""
        sums: dict[str, float] = {}
        counts = torch.zeros(self.model.n_embed, dtype=torch.int64)
        images = 0
        for batch in batches:
            self.model.logged.clear()
            with _codes(self.model.quantize) as seen:
                self.model.validation_step(batch, 0)
            counts += torch.bincount(torch.cat([part.flatten() for part in seen]).cpu(), minlength=len(counts))
            size = len(batch[self.model.image_key])
            for name, value in logged(self.model, "val").items():
                if name not in _MEANINGLESS_IN_VALIDATION:
                    sums[name] = sums.get(name, 0.0) + float(value) * size
            images += size
        return {name: total / images for name, total in sums.items()} | codebook_use(counts)

    def images(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Inputs and their reconstructions."""
        shown = self.model.log_images(batch)
        return [shown["inputs"], shown["reconstructions"]]


@contextmanager
def _codes(quantize: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the indices of each call of the quantiser."""
    seen: list[Tensor] = []
    handle = quantize.register_forward_hook(lambda module, inputs, output: seen.append(output[2][2]))
    try:
        yield seen
    finally:
        handle.remove()


def codebook_use(counts: Tensor) -> dict[str, float]:
    """From how often each code was chosen (n_embed,): the share of codes in use, and their perplexity.

    Perplexity is exp of the entropy of their frequencies: n_embed when all are equally frequent, 1 when there is one.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_perplexity": math.exp(float(entropy)),
    }
