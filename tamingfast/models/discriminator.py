"""The patch discriminator (Isola et al. 2017) of the adversarial loss, paper section 3.1, eq. 5."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tamingfast.models.shared import BatchNorm2d, moments
from tamingfast.ranks import alone


class ActNorm(nn.Module):
    """Per-channel affine map, initialised to standardise the first training batch (Glow, section 3.1)."""

    initialized: Tensor

    def __init__(self, num_features: int, logdet: bool = False, affine: bool = True, allow_reverse_init: bool = False):
        if not affine:
            raise ValueError("affine: got False, expected True, as ActNorm is an affine map")
        super().__init__()
        self.logdet, self.allow_reverse_init = logdet, allow_reverse_init
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the map to the one that standardises each channel of x (B, C, H, W), over all processes if several."""
        if alone():
            mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        else:
            mean, variance, count = moments(x)
            deviation = (variance * count / (count - 1)).sqrt()
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (deviation + 1e-6))
        self.initialized.fill_(1)

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W) or (B, C) -> the same shape; forwards with ``logdet``, also the log-determinant (B,).

        Raises RuntimeError if the first call in training mode is a reverse one, unless ``allow_reverse_init``.
        """
        flat = x.ndim == 2
        x = x[:, :, None, None] if flat else x
        if self.training and not self.initialized:
            if reverse and not self.allow_reverse_init:
                raise RuntimeError("ActNorm is not initialised; run it forwards first or set allow_reverse_init=True")
            self.initialize(x)
        h = x / self.scale - self.loc if reverse else self.scale * (x + self.loc)
        h = h[:, :, 0, 0] if flat else h
        if reverse or not self.logdet:
            return h
        logdet = x.shape[2] * x.shape[3] * self.scale.abs().log().sum()
        return h, logdet.expand(x.shape[0])


def weights_init(module: nn.Module) -> None:
    """Initialise convolutions with Normal(0, 0.02) and batch norms with Normal(1, 0.02), as pix2pix does."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class NLayerDiscriminator(nn.Module):
    """``n_layers`` strided 4x4 convolutions, then two of stride 1: one real/fake logit per patch."""

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False):
        super().__init__()
        norm = ActNorm if use_actnorm else BatchNorm2d
        widths = [ndf * min(2**level, 8) for level in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for level in range(1, n_layers + 1):
            stride = 2 if level < n_layers else 1
            # Batch norm has a bias of its own, so its convolution needs none.
            conv = nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=use_actnorm)
            layers += [conv, norm(widths[level]), nn.LeakyReLU(0.2, True)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, 1, h, w)."""
        return self.main(x)
