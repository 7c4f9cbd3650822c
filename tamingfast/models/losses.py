"""Losses of the first stages: reconstruction, perceptual, adversarial and codebook terms (paper eq. 4 to 7)."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.models.base import at_least
from tamingfast.models.classifiers import LogitDistance
from tamingfast.models.discriminator import NLayerDiscriminator, weights_init
from tamingfast.models.lpips import LPIPS
from tamingfast.models.shared import mean_over_processes, sum_over_processes

_Fixed = TypeVar("_Fixed", LPIPS, LogitDistance)


def _drop_perceptual_weights(loss: nn.Module, state: dict[str, Tensor], prefix: str, *args: object) -> None:
    """Load hook: drop the fixed weights of LPIPS that the original's checkpoints contain; for `DummyLoss`, all."""
    perceptual = f"{prefix}perceptual_loss."
    dropped = prefix if isinstance(loss, DummyLoss) else perceptual
    for key in [key for key in state if key.startswith(dropped)]:
        del state[key]


class DummyLoss(nn.Module):
    """The loss of a model that is not trained; when a checkpoint is loaded, the weights of its loss are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_drop_perceptual_weights)


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """``weight`` from step ``threshold`` on, ``value`` before."""
    return value if global_step < threshold else weight


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: zero for real logits above 1 and fake ones below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Binary cross entropy of the discriminator."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


#: Names the autoencoder's loss (Goodfellow et al. 2014, section 3); the discriminator's is the vanilla one.
NON_SATURATING = "non_saturating"
_DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss, NON_SATURATING: vanilla_d_loss}


def lecam_regularization(logits_real: Tensor, logits_fake: Tensor, averages: Tensor) -> Tensor:
    """LeCam regularisation () of the discriminator (Tseng et al. 2021, eq. 4).

    ``averages`` (2,) are moving averages of its logits for real and for fake images: each kind's logits are drawn
    towards the average of the other.
    """
    return (logits_real - averages[1]).square().mean() + (logits_fake - averages[0]).square().mean()


class VQLPIPSWithDiscriminator(nn.Module):
    """L1 + LPIPS + codebook loss + adversarial loss with the adaptive weight (paper eq. 6 and 7).

    The adversarial terms count from step ``disc_start`` on. ``perceptual_weights`` is the source of the LPIPS backbone
    (see `tamingfast.models.lpips.LPIPS`), which is built on first use and is not part of the state dict. Before
    ``disc_start`` the original evaluates the discriminator and multiplies the result by zero; with
    ``rest_before_start`` it is not evaluated then, which saves time and gives the same gradients.

    The other departures: the ``disc_loss`` "non_saturating" replaces the autoencoder's -D(x) by softplus(-D(x)); the
    discriminator learns already ``disc_warmup`` steps before its loss counts for the autoencoder; and ``lecam_weight``
    is that of `lecam_regularization` in the discriminator's loss, whose averages follow with ``lecam_decay``.
    ``classifier_weight`` is that of a second perceptual term, `tamingfast.models.classifiers.LogitDistance` with the
    file ``classifier_weights``, which is treated as LPIPS is.
    """

    lecam_averages: Tensor

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        perceptual_weights: str | os.PathLike | None = None,
        rest_before_start: bool = False,
        disc_warmup: int = 0,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.99,
        classifier_weight: float = 0.0,
        classifier_weights: str | os.PathLike | None = None,
    ):
        super().__init__()
        if disc_loss not in _DISCRIMINATOR_LOSSES:
            raise ValueError(f"disc_loss: got '{disc_loss}', expected one of {', '.join(_DISCRIMINATOR_LOSSES)}")
        at_least(0, disc_warmup=disc_warmup, lecam_weight=lecam_weight, classifier_weight=classifier_weight)
        if not 0 <= lecam_decay < 1:
            raise ValueError(f"lecam_decay: got {lecam_decay}, expected at least 0 and less than 1")
        self.codebook_weight, self.pixel_weight = codebook_weight, pixelloss_weight
        self.perceptual_weight, self.perceptual_weights = perceptual_weight, perceptual_weights
        self.classifier_weight, self.classifier_weights = classifier_weight, classifier_weights
        self.discriminator = NLayerDiscriminator(
            input_nc=disc_in_channels, n_layers=disc_num_layers, use_actnorm=use_actnorm, ndf=disc_ndf
        ).apply(weights_init)
        self.discriminator_iter_start = disc_start
        self.discriminator_learns_from = disc_start - disc_warmup
        self.lecam_weight, self.lecam_decay = lecam_weight, lecam_decay
        if lecam_weight > 0:
            self.register_buffer("lecam_averages", torch.zeros(2))
        self.saturates = disc_loss != NON_SATURATING
        self.disc_loss = _DISCRIMINATOR_LOSSES[disc_loss]
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.disc_conditional, self.rest_before_start = disc_conditional, rest_before_start
        self.register_load_state_dict_pre_hook(_drop_perceptual_weights)

    @property
    def perceptual_loss(self) -> LPIPS:
        """The perceptual distance, built on first use, on the discriminator's device."""
        return self._fixed(LPIPS, self.perceptual_weights)

    @property
    def classifier_loss(self) -> LogitDistance:
        """The distance in a classifier's logits, built on first use, on the discriminator's device."""
        return self._fixed(LogitDistance, self.classifier_weights)

    def _fixed(self, kind: type[_Fixed], weights: str | os.PathLike | None) -> _Fixed:
        # Kept outside the module tree, so that its frozen weights are not trained, saved or set to training mode, which
        # in the original turns the dropout of LPIPS on.
        networks = self.__dict__.setdefault("_fixed_networks", {})
        if kind not in networks:
            networks[kind] = kind(weights)
        return networks[kind].to(next(self.discriminator.parameters()).device)

    def load_networks(self) -> None:
        """Build the fixed networks that count now, instead of on first use; UserError if their weights are missing."""
        if self.perceptual_weight > 0:
            _ = self.perceptual_loss
        if self.classifier_weight > 0:
            _ = self.classifier_loss

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
        """The adaptive weight () of the adversarial loss (paper eq. 7).

        The ratio of both losses' gradient norms at the decoder's last layer, at most 10^4, times ``disc_weight``; over
        the images of all processes.
        """
        (nll_grad,) = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)
        (g_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
        mean_over_processes(nll_grad, g_grad)
        ratio = nll_grad.norm() / (g_grad.norm() + 1e-4)
        return ratio.clamp(0.0, 1e4).detach() * self.discriminator_weight

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: nn.Parameter | None = None,
        cond: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the autoencoder (``optimizer_idx`` 0) or the discriminator (1), and a log under ``split/``.

        Images are (B, C, H, W) in [-1, 1]; ``cond`` (B, c, H, W) is concatenated to them for a conditional
        discriminator. Raises ValueError for a condition without ``disc_conditional``, and for ``disc_conditional``
        without a condition.
        """
        if (cond is not None) != self.disc_conditional:
            got = "no condition" if cond is None else "a condition"
            raise ValueError(f"cond: got {got}, expected one if and only if disc_conditional=True; change one of them")
        start = self.discriminator_iter_start if optimizer_idx == 0 else self.discriminator_learns_from
        factor = adopt_weight(self.disc_factor, global_step, threshold=start)
        if optimizer_idx == 0:
            return self._autoencoder(codebook_loss, inputs, reconstructions, factor, last_layer, cond, split)
        return self._discriminator(inputs, reconstructions, factor, cond, split)

    def _judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        return self.discriminator(images if cond is None else torch.cat((images, cond), dim=1))

    def _against(self, logits: Tensor) -> Tensor:
        """What the autoencoder minimizes () of the discriminator's logits for its images."""
        return (-logits if self.saturates else F.softplus(-logits)).mean()

    def _autoencoder(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        factor: float,
        last_layer: nn.Parameter | None,
        cond: Tensor | None,
        split: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rec_loss = (inputs - reconstructions).abs()
        p_loss = inputs.new_zeros(1)
        if self.perceptual_weight > 0:
            p_loss = self.perceptual_loss(inputs, reconstructions)
            rec_loss = rec_loss + self.perceptual_weight * p_loss
        second = {}
        if self.classifier_weight > 0:
            classifier_loss = self.classifier_loss(inputs, reconstructions)
            rec_loss = rec_loss + self.classifier_weight * classifier_loss
            second["classifier_loss"] = classifier_loss.mean()
        nll_loss = rec_loss.mean()
        resting = self.rest_before_start and factor == 0
        g_loss = inputs.new_zeros(()) if resting else self._against(self._judge(reconstructions, cond))
        if not resting and torch.is_grad_enabled() and reconstructions.requires_grad and last_layer is not None:
            d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        else:
            d_weight = inputs.new_zeros(())  # there are no gradients to compare, as in validation
        codebook = codebook_loss.mean()
        loss = nll_loss + d_weight * factor * g_loss + self.codebook_weight * codebook
        log = {
            "total_loss": loss, "quant_loss": codebook, "nll_loss": nll_loss, "rec_loss": rec_loss.mean(),
            "p_loss": p_loss.mean(), "d_weight": d_weight, "disc_factor": torch.tensor(factor), "g_loss": g_loss,
            **second,
        }  # fmt: skip
        return loss, {f"{split}/{name}": value.detach().clone() for name, value in log.items()}

    def _discriminator(
        self, inputs: Tensor, reconstructions: Tensor, factor: float, cond: Tensor | None, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        real = self._judge(inputs.detach(), cond)
        fake = self._judge(reconstructions.detach(), cond)
        loss = self.disc_loss(real, fake)
        if self.lecam_weight > 0:
            if self.training and torch.is_grad_enabled():
                self._follow(real.detach().mean(), fake.detach().mean())
            loss = loss + self.lecam_weight * lecam_regularization(real, fake, self.lecam_averages)
        loss = factor * loss
        log = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {f"{split}/{name}": value.detach().clone() for name, value in log.items()}

    def _follow(self, real: Tensor, fake: Tensor) -> None:
        """Move the averages of the logits, over all processes, towards these means."""
        sums = torch.stack((real, fake, torch.ones_like(real))).to(self.lecam_averages.dtype)
        sum_over_processes(sums)
        self.lecam_averages.lerp_(sums[:2] / sums[2], 1 - self.lecam_decay)


class BCELoss(nn.Module):
    """Binary cross entropy between label logits and one-hot maps."""

    def forward(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and targets, both (B, n, H, W) -> ``(loss, empty log)``."""
        return F.binary_cross_entropy_with_logits(prediction, target), {}


class BCELossWithQuant(nn.Module):
    """Binary cross entropy plus the codebook loss: the loss of `tamingfast.models.vqgan.VQSegmentationModel`."""

    def __init__(self, codebook_weight: float = 1.0):
        super().__init__()
        self.codebook_weight = codebook_weight

    def forward(
        self, qloss: Tensor, target: Tensor, prediction: Tensor, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Codebook loss, one-hot maps and logits (both (B, n, H, W)) -> ``(loss, log)``."""
        bce_loss = F.binary_cross_entropy_with_logits(prediction, target)
        loss = bce_loss + self.codebook_weight * qloss
        log = {"total_loss": loss, "bce_loss": bce_loss, "quant_loss": qloss}
        return loss, {f"{split}/{name}": value.detach().mean() for name, value in log.items()}
