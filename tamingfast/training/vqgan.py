"""Training of the first stage (paper section 3.1), with the same steps as the original under Lightning."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import at, plain
from tamingfast.checkpoints.targets import class_of
from tamingfast.data import Index
from tamingfast.errors import UserError
from tamingfast.models.losses import VQLPIPSWithDiscriminator
from tamingfast.models.quantize import VectorQuantizer
from tamingfast.models.vqgan import Outputs, VQModel, VQSegmentationModel
from tamingfast.ranks import World, world
from tamingfast.training import loop
from tamingfast.training.acceleration import accelerate, fuse
from tamingfast.training.averages import averages_of
from tamingfast.training.begin import as_begun, begin, divided, new_model
from tamingfast.training.configs import check_stage
from tamingfast.training.datasets import Datasets, datasets_of
from tamingfast.training.feed import step_batches
from tamingfast.training.fine_tuning import Start
from tamingfast.training.fitting import fitted
from tamingfast.training.keys import parameters_of
from tamingfast.training.seeds import seed_for
from tamingfast.training.settings import DDP, training_settings
from tamingfast.training.stage import Batch, Loss, optimizers_of
from tamingfast.training.step import learning_rate
from tamingfast.training.tokens import check_images, grid_of

#: In evaluation mode the losses have no adaptive weight, so these say nothing about the model.
_MEANINGLESS_IN_VALIDATION = ("d_weight", "disc_factor", "aeloss", "total_loss")
#: Number of latents, per code, from which the codebook is drawn.
_LATENTS_PER_CODE = 4


def train(
    config: Mapping[str, Any],
    out: str | os.PathLike,
    resume: bool = False,
    device: str | torch.device | None = None,
    datasets: Datasets | None = None,
    *,
    start: str | os.PathLike | None = None,
    allow: Collection[str] = (),
) -> Path:
    """Train the first stage that ``config`` describes into the run directory ``out``; returns ``out``.

    ``config`` is a mapping as from `tamingfast.training.load_config`; ``datasets`` (training, validation) replaces its
    ``data:`` section. ``resume`` continues from the state in ``out``, bit for bit on a CPU. A new run begins with the
    weights of ``start``, if that is given: the path of a first stage, whose architecture then replaces that of
    ``config``, so that ``codebook_from_data`` does not apply. ``allow`` names further classes that its config may name.

    Raises UserError for a config or data that cannot be trained on and when training diverges, and its subclass
    `loop.Stopped` when the process is asked to stop.
    """
    config, out = dict(plain(config)), Path(out)
    settings = training_settings(config)
    if settings.parallel != DDP:
        raise UserError(
            f"training.parallel: got {settings.parallel} for a first stage, expected {DDP}, as its step goes through "
            "the model more than once; leave it out"
        )
    check_stage(config, prior=False)
    begun = None if start is None else Start(start, VQModel, allow)
    if begun is not None:
        config["model"] = begun.described(config.get("model") or {})
        config["data"] = config.get("data") or begun.data
        settings = replace(settings, codebook_from_data=False)
    described = config.get("model") or {}
    check_loss(described)
    index = Index(out / run_directory.INDEX if resume else None)
    with world(device) as among:
        training, validation = datasets_of(config, datasets, index)
        began = as_begun(out, resume, among)
        settings = fitted(settings, training, began)
        lr = learning_rate(settings, described.get("base_learning_rate"), began.size)
        running = divided(settings, began, among)
        model = cast(VQModel, new_model(described, settings.seed))
        if begun is not None:
            begun.load(model)
        check_images(training, model.image_key)
        grid_of(training, model, model.image_key)  # raises for images that the model would crop
        stage = VQGANStage(model.to(among.device), lr, settings.shared_forward)
        if settings.codebook_from_data:
            _codebooks(model)  # raises for a model without one
        accelerate(model, settings)
        fuse(stage.optimizers)
        averages = averages_of(stage, settings)
        with begin(config, out, resume, settings, training, among, began, stage, averages, index) as progress:
            if settings.codebook_from_data and progress is None:
                # Every process reads the same batches, as if alone, and so gets the same codebook.
                alone = World(0, 1, among.device)
                start_codebook(model, step_batches(training, settings, alone, 0), settings.seed)
            return loop.run(stage, running, (training, validation), out, among, progress, averages)


def check_loss(described: Mapping[str, Any]) -> None:
    """Raise UserError for a ``model`` section whose loss cannot train, such as the `DummyLoss` of published configs."""
    loss, model = at(described, "params", "lossconfig"), class_of(described.get("target"), "model.target")
    if "lossconfig" not in (parameters_of(model) or ()):
        return  # a class of the user's
    target = at(loss, "target")
    if target is not None:
        arguments = 3 if issubclass(model, VQSegmentationModel) else 5  # as `loss_of` passes them
        more = {"split": "train"} if arguments == 3 else {"split": "train", "last_layer": None}
        try:
            trains: Any = class_of(target, "model.params.lossconfig.target")
            inspect.signature(trains.forward).bind(None, *[None] * arguments, **more)
            return
        except (TypeError, AttributeError):
            pass
    raise UserError(
        f"model.params.lossconfig: got {target or loss!r}, with which a model can be used but not trained, expected a "
        "loss that trains it; give the target and params of one, such as "
        "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator with disc_start"
    )


@torch.no_grad()
def start_codebook(model: VQModel, batches: Iterator[tuple[int, list[dict[str, Any]]]], seed: int) -> None:
    """Set each codebook to latents of the untrained encoder, drawn from the first training batches.

    The original starts it within 1/n_embed of zero, from where short runs come to use few codes. Takes batches until
    there are four latents for each code. If there are two codebooks, the latents of the second depend on the first and
    are drawn after it is set. Raises UserError for a quantiser without a `VectorQuantizer`.
    """
    images = _Replayed(model, batches)
    for quantizer in _codebooks(model):
        codes = quantizer.n_e
        rows = _latents(model, quantizer, images, _LATENTS_PER_CODE * codes)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed_for(seed, "codebook")))
        quantizer.start(rows[order[:codes].to(rows.device)])


def _codebooks(model: VQModel) -> list[VectorQuantizer]:
    found = [module for module in model.quantize.modules() if isinstance(module, VectorQuantizer)]
    if not found:
        raise UserError(
            f"training.codebook_from_data: got true for a {type(model).__name__}, expected false; it applies to models "
            "with a table of codes"
        )
    return found


class _Replayed:
    """The images (B, C, H, W) of ``batches``; each iteration starts again at the first batch."""

    def __init__(self, model: VQModel, batches: Iterator[tuple[int, list[dict[str, Any]]]]):
        self.model, self.batches = model, batches
        self.taken: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.taken
        while True:
            for batch in next(self.batches)[1]:
                self.taken.append(self.model.get_input(batch, self.model.image_key))
                yield self.taken[-1]


def _latents(model: VQModel, quantizer: VectorQuantizer, images: Iterable[Tensor], count: int) -> Tensor:
    """At least ``count`` inputs (N, D) of ``quantizer``."""
    found: list[Tensor] = []

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].movedim(1, -1).flatten(0, -2))

    hook = quantizer.register_forward_pre_hook(collect)
    try:
        for x in images:
            model.encode(x)
            if sum(len(rows) for rows in found) >= count:
                break
    finally:
        hook.remove()
    return torch.cat(found)


class VQGANStage:
    """Any first stage of ours with one optimizer (segmentation) or two (autoencoder, discriminator).

    With ``shared_forward`` the discriminator learns from the reconstructions that the autoencoder was just trained on,
    instead of new ones, and does not run before it learns, which saves one pass through encoder and decoder. That
    departs from the original, where the discriminator sees reconstructions of the autoencoder after its step.
    """

    shown: tuple[str, ...] = ("aeloss", "discloss", "rec_loss", "codebook_usage", "codebook_perplexity")

    def __init__(self, model: VQModel, learning_rate: float, shared_forward: bool = False):
        self.model = model
        model.learning_rate = learning_rate
        self.optimizers = optimizers_of(model)
        self._shares = shared_forward and len(self.optimizers) == 2
        self._shared: Outputs | None = None
        if isinstance(model.loss, VQLPIPSWithDiscriminator):
            model.loss.load_networks()  # not in the middle of a step

    @property
    def averaged(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {
            name: value for name, value in state.items() if value.is_floating_point() and not name.startswith("loss.")
        }

    def loss(self, batch: Batch, index: int) -> Loss | None:
        self.model.logged.clear()
        if not self._shares:
            return self._loss(self.model.outputs(batch), index)
        if index == 0:
            outputs = self.model.outputs(batch)
            self._shared = Outputs(*(part.detach() for part in outputs))
            return self._loss(outputs, index)
        shared, self._shared = self._shared, None
        resting = self.model.global_step < getattr(self.model.loss, "discriminator_learns_from", 0)
        return None if resting or shared is None else self._loss(shared, index)

    def _loss(self, outputs: Outputs, index: int) -> Loss:
        return self.model.loss_of(outputs, index), logged(self.model, "train")

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Means of the values that the model reports for validation, and `codebook_use`."""
        sums: dict[str, float] = {}
        counts = torch.zeros(self.model.n_embed, dtype=torch.int64)
        images = 0
        for batch in batches:
            self.model.logged.clear()
            x = self.model.get_input(batch, self.model.image_key)
            quant, codebook_loss, (_, _, indices) = self.model.quantised(x)
            self.model.report(Outputs(x, self.model.decode_quantised(quant), codebook_loss))
            counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
            for name, value in logged(self.model, "val").items():
                if name not in _MEANINGLESS_IN_VALIDATION:
                    sums[name] = sums.get(name, 0.0) + float(value) * len(x)
            images += len(x)
        return {name: total / images for name, total in sums.items()} | codebook_use(counts)

    def images(self, batch: Batch) -> list[Tensor]:
        """Inputs and their reconstructions."""
        shown = self.model.log_images(batch)
        return [shown["inputs"], shown["reconstructions"]]


def logged(model: VQModel, split: str) -> dict[str, Tensor]:
    """What the model has reported under ``split/`` or without a prefix: tensors () by name, the prefix removed."""
    names = {name.removeprefix(f"{split}/"): value for name, value in model.logged.items()}
    return {name: torch.as_tensor(value).detach().float().mean() for name, value in names.items()}


def codebook_use(counts: Tensor) -> dict[str, float]:
    """From the number of times each code was chosen (n_embed,): the share of codes in use, and their perplexity.

    Perplexity is exp of the entropy of their frequencies: n_embed when all are equally frequent, 1 for a single code.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_perplexity": math.exp(float(entropy)),
    }
