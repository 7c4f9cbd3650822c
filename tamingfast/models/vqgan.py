"""The first stage: a convolutional encoder and decoder around a codebook (paper section 3.1).

Module names are the original's state-dict keys.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast import ops
from tamingfast.checkpoints.config import instantiate_from_config, plain
from tamingfast.checkpoints.weights import init_from_ckpt
from tamingfast.models.base import FirstStage, at_least, image_from_batch
from tamingfast.models.quantize import EMAVectorQuantizer, GumbelQuantize, VectorQuantizer

ADAM_BETAS = (0.5, 0.9)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups and eps 1e-6, optionally followed by the activation x * sigmoid(x) in one op."""

    def __init__(self, channels: int, silu: bool = False):
        super().__init__(num_groups=32, num_channels=channels, eps=1e-6)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, groups=self.num_groups, eps=self.eps, silu=self.silu)


def Normalize(in_channels: int) -> GroupNorm:
    """The normalisation of every block, under the original's name."""
    return GroupNorm(in_channels)


class ResnetBlock(nn.Module):
    """Two (norm, swish, 3x3 convolution) and a shortcut, which is a convolution where the width changes."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = GroupNorm(in_channels, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = GroupNorm(out_channels, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = "conv_shortcut" if conv_shortcut else "nin_shortcut"
            kernel = 3 if conv_shortcut else 1
            self.add_module(self.shortcut, nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2))

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h)))
        return (x if self.shortcut is None else getattr(self, self.shortcut)(x)) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions as projections."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.norm = GroupNorm(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # Contiguous, as PyTorch's attention on CPUs else holds a score for each pair of positions: 17 GB for 256 x 256.
        q, k, v = (conv(h).flatten(2).transpose(1, 2).contiguous()[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H*W, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    """Double the resolution by repetition, then a 3x3 convolution."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve the resolution: a strided 3x3 convolution padded at the right and bottom only, or an average."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)


def _middle(channels: int, dropout: float) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(in_channels=channels, dropout=dropout)
    mid.attn_1 = AttnBlock(channels)
    mid.block_2 = ResnetBlock(in_channels=channels, dropout=dropout)
    return mid


def _through_middle(mid: nn.Module, h: Tensor) -> Tensor:
    return mid.block_2(mid.attn_1(mid.block_1(h)))


def _level(channels: int, out: int, blocks: int, attention: bool, dropout: float) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList(
        ResnetBlock(in_channels=channels if i == 0 else out, out_channels=out, dropout=dropout) for i in range(blocks)
    )
    level.attn = nn.ModuleList(AttnBlock(out) for _ in range(blocks if attention else 0))
    return level


def _through_level(level: nn.Module, h: Tensor) -> Tensor:
    for i, block in enumerate(level.block):
        h = block(h)
        if level.attn:
            h = level.attn[i](h)
    return h


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> latents (B, z_channels, H/f, W/f), f = 2^(len(ch_mult)-1).

    Sides that f does not divide lose their last pixels, as in the original, so what is decoded is smaller.
    ``ch * ch_mult[i]`` is the width at level i; attention follows every block at ``attn_resolutions`` (in pixels of
    a square input of side ``resolution``). Further keyword arguments of the shared ``ddconfig`` are ignored.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Iterable[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        **ignored: Any,
    ):
        super().__init__()
        at_least(1, in_channels=in_channels, z_channels=z_channels, resolution=resolution)
        at_least(0, num_res_blocks=num_res_blocks)
        widths = [ch * multiplier for multiplier in ch_mult]
        attn_resolutions = set(attn_resolutions)
        self.ch, self.temb_ch, self.in_channels, self.resolution = ch, 0, in_channels, resolution
        self.num_resolutions, self.num_res_blocks = len(widths), num_res_blocks
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            attention = resolution // 2**i in attn_resolutions
            level = _level(widths[i - 1] if i else ch, width, num_res_blocks, attention, dropout)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = _middle(widths[-1], dropout)
        self.norm_out = GroupNorm(widths[-1], silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = _through_level(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(self.norm_out(_through_middle(self.mid, h)))


class Decoder(nn.Module):
    """The encoder reversed: latents (B, z_channels, h, w) -> images (B, out_ch, f*h, f*w).

    ``up[i]`` belongs to level i, as in the encoder, so the last entry runs first.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Iterable[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Iterable[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        **ignored: Any,
    ):
        super().__init__()
        at_least(1, out_ch=out_ch, z_channels=z_channels, resolution=resolution)
        at_least(0, num_res_blocks=num_res_blocks)
        widths = [ch * multiplier for multiplier in ch_mult]
        attn_resolutions = set(attn_resolutions)
        self.give_pre_end = give_pre_end
        self.ch, self.temb_ch, self.resolution = ch, 0, resolution
        self.num_resolutions, self.num_res_blocks = len(widths), num_res_blocks
        lowest = resolution // 2 ** (len(widths) - 1)
        self.z_shape = (1, z_channels, lowest, lowest)
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], dropout)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            attention = lowest * 2 ** (len(widths) - 1 - i) in attn_resolutions
            level = _level(above, width, num_res_blocks + 1, attention, dropout)
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
            self.up.append(level)
        self.norm_out = GroupNorm(widths[0], silu=True)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = _through_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            h = _through_level(level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return h if self.give_pre_end else self.conv_out(self.norm_out(h))


class Outputs(NamedTuple):
    """What the losses compare: images and reconstructions, both (B, C, H, W), and the codebook loss ()."""

    images: Tensor
    reconstructions: Tensor
    codebook_loss: Tensor


class VQModel(FirstStage):
    """VQGAN: encoder, codebook, decoder, and the loss that trains them (paper section 3.1).

    ``ddconfig`` goes to `Encoder` and `Decoder`, ``lossconfig`` is a ``{target, params}`` config, the codebook has
    ``n_embed`` entries of width ``embed_dim``. ``ckpt_path`` loads weights, without keys that start with
    ``ignore_keys``. Images are in [-1, 1].
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | os.PathLike | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        remap: str | os.PathLike | None = None,
        sane_index_shape: bool = False,
    ):
        super().__init__()
        ddconfig = plain(ddconfig)
        self.image_key = image_key
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        self.quantize = self.make_quantizer(ddconfig, n_embed, embed_dim, remap, sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def make_quantizer(
        self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int, remap: Any, sane_index_shape: bool
    ) -> nn.Module:
        """The quantiser that subclasses exchange."""
        return VectorQuantizer(n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape)

    def init_from_ckpt(self, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
        """Load the weights of a checkpoint file; see `tamingfast.checkpoints.weights.init_from_ckpt`."""
        init_from_ckpt(self, path, ignore_keys)

    def encode(self, x: Tensor):
        """Images (B, C, H, W) -> ``(quant (B, embed_dim, h, w), codebook loss, (_, _, indices int64))``."""
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised latents (B, embed_dim, h, w) -> images (B, C, f*h, f*w)."""
        return self.decoder(self.decoder_input(quant))

    def decoder_input(self, quant: Tensor) -> Tensor:
        """Quantised latents -> what the decoder takes: (B, z_channels, h, w)."""
        return self.post_quant_conv(quant)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Codebook indices -> images: (B, h, w), or (B, n) for a square grid, or (n,) for one square image.

        The original's method calls a function that does not exist.
        """
        if code_b.ndim == 1:
            code_b = code_b[None]
        if code_b.ndim == 2:
            side = math.isqrt(code_b.shape[1])
            if side * side != code_b.shape[1]:
                raise ValueError(
                    f"got {code_b.shape[1]} indices, not a square grid; pass them as (batch, height, width)"
                )
            code_b = code_b.view(-1, side, side)
        b, h, w = code_b.shape
        return self.decode(self.quantize.get_codebook_entry(code_b.reshape(-1), (b, h, w, self.embed_dim)))

    @property
    def embed_dim(self) -> int:
        """Width of a codebook entry."""
        return self.post_quant_conv.in_channels

    @property
    def factor(self) -> int:
        """Pixels per token along one side: f = 2^m of the paper."""
        return 2 ** (len(self.encoder.down) - 1)

    @property
    def n_embed(self) -> int:
        """Number of token values, after a remap."""
        return self.quantize.re_embed

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> ``(reconstructions, codebook loss)``."""
        quant, codebook_loss, _ = self.encode(input)
        return self.decode(quant), codebook_loss

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """``batch[k]`` (B, H, W[, C]) -> float32 (B, C, H, W)."""
        return image_from_batch(batch, k).float()

    def outputs(self, batch: Mapping[str, Tensor]) -> Outputs:
        """The forward pass of a training step on a batch."""
        x = self.get_input(batch, self.image_key)
        return Outputs(x, *self(x))

    def loss_of(self, outputs: Outputs, optimizer_idx: int = 0, split: str = "train") -> Tensor:
        """Loss of the autoencoder (``optimizer_idx`` 0) or of the discriminator (1), reported under ``split/``."""
        loss, log = self.loss(
            outputs.codebook_loss, outputs.images, outputs.reconstructions, optimizer_idx, self.global_step,
            last_layer=self.get_last_layer(), split=split,
        )  # fmt: skip
        self.log(f"{split}/{('aeloss', 'discloss')[optimizer_idx]}", loss)
        self.log_dict(log)
        return loss

    def report(self, outputs: Outputs) -> None:
        """Report all losses under ``val/``."""
        for optimizer_idx in range(2):
            self.loss_of(outputs, optimizer_idx, "val")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int, optimizer_idx: int = 0) -> Tensor:
        """`loss_of` a batch."""
        return self.loss_of(self.outputs(batch), optimizer_idx)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Callable:
        """Report the losses of a batch under ``val/``; returns `log_dict`, as the original does."""
        x = self.get_input(batch, self.image_key)
        self.report(Outputs(x, *self(x)))
        return self.log_dict

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """What the first optimizer trains: all but the discriminator."""
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        return [parameter for part in parts for parameter in part.parameters()]

    def configure_optimizers(self):
        """``([autoencoder's Adam, discriminator's Adam], [])`` at ``self.learning_rate``."""
        autoencoder = torch.optim.Adam(self.autoencoder_parameters(), lr=self.learning_rate, betas=ADAM_BETAS)
        if not hasattr(self.loss, "discriminator"):
            return [autoencoder], []
        discriminator = torch.optim.Adam(self.loss.discriminator.parameters(), lr=self.learning_rate, betas=ADAM_BETAS)
        return [autoencoder, discriminator], []

    def get_last_layer(self) -> nn.Parameter:
        """The weight at which the adaptive weight compares gradients (paper eq. 7)."""
        return self.decoder.conv_out.weight

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """``inputs`` and ``reconstructions`` (B, 3, H, W); more than three channels are shown in random colours."""
        x = self.get_input(batch, self.image_key).to(self.device)
        reconstructions, _ = self(x)
        if x.shape[1] > 3:
            x, reconstructions = self.to_rgb(x), self.to_rgb(reconstructions)
        return {"inputs": x, "reconstructions": reconstructions}

    def to_rgb(self, x: Tensor) -> Tensor:
        """Label maps (B, n, H, W) -> colours (B, 3, H, W) in [-1, 1] by a fixed random projection."""
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1).to(x))
        x = F.conv2d(x, self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0


class VQSegmentationModel(VQModel):
    """A first stage for label maps with ``n_labels`` channels, trained without a discriminator."""

    def __init__(self, n_labels: int, *args: Any, **kwargs: Any):
        # The buffer must exist before a checkpoint that holds it is loaded.
        ckpt_path = kwargs.pop("ckpt_path", None)
        super().__init__(*args, **kwargs)
        self.register_buffer("colorize", torch.randn(3, n_labels, 1, 1))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, kwargs.get("ignore_keys", ()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam: there is no discriminator."""
        return torch.optim.Adam(self.autoencoder_parameters(), lr=self.learning_rate, betas=ADAM_BETAS)

    def loss_of(self, outputs: Outputs, optimizer_idx: int = 0, split: str = "train") -> Tensor:
        """Cross entropy plus codebook loss, reported under ``split/``."""
        loss, log = self.loss(outputs.codebook_loss, outputs.images, outputs.reconstructions, split=split)
        self.log_dict(log)
        return loss

    def report(self, outputs: Outputs) -> None:
        """Report the loss under ``val/``."""
        self.loss_of(outputs, split="val")

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, reported under ``val/``."""
        x = self.get_input(batch, self.image_key)
        return self.loss_of(Outputs(x, *self(x)), split="val")

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """As `VQModel.log_images`, with the most likely label of each reconstructed pixel."""
        x = self.get_input(batch, self.image_key).to(self.device)
        reconstructions, _ = self(x)
        labels = F.one_hot(reconstructions.argmax(1), x.shape[1]).permute(0, 3, 1, 2).to(x)
        return {"inputs": self.to_rgb(x), "reconstructions": self.to_rgb(labels)}


class VQNoDiscModel(VQModel):
    """A first stage whose loss has no adversarial part."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One Adam: there is no discriminator."""
        return torch.optim.Adam(self.autoencoder_parameters(), lr=self.learning_rate, betas=ADAM_BETAS)


class EMAVQ(VQModel):
    """VQModel whose codebook is moved by running means."""

    def make_quantizer(
        self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int, remap: Any, sane_index_shape: bool
    ) -> nn.Module:
        return EMAVectorQuantizer(n_embed, embed_dim, beta=0.25, remap=remap)

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Without the codebook, which has no gradient."""
        return [parameter for parameter in super().autoencoder_parameters() if parameter.requires_grad]


class LambdaWarmUpCosineScheduler:
    """A number as a function of the step: linear from ``lr_start`` to ``lr_max``, then a cosine down to ``lr_min``."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        self.lr_warm_up_steps, self.lr_max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_start, self.lr_min, self.lr_max = lr_start, lr_min, lr_max
        self.last_lr = 0.0

    def schedule(self, n: int) -> float:
        """The value at step n."""
        if n < self.lr_warm_up_steps:
            self.last_lr = (self.lr_max - self.lr_start) / self.lr_warm_up_steps * n + self.lr_start
        else:
            t = (n - self.lr_warm_up_steps) / (self.lr_max_decay_steps - self.lr_warm_up_steps)
            self.last_lr = self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(min(t, 1.0) * math.pi))
        return self.last_lr

    __call__ = schedule


class GumbelVQ(VQModel):
    """VQModel with a `GumbelQuantize` whose temperature follows ``temperature_scheduler_config``."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        temperature_scheduler_config: Mapping[str, Any],
        ckpt_path: str | os.PathLike | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        kl_weight: float = 1e-8,
        remap: str | os.PathLike | None = None,
    ):
        self._kl_weight = kl_weight  # read by make_quantizer, which the base constructor calls
        super().__init__(
            ddconfig,
            lossconfig,
            n_embed,
            embed_dim,
            ckpt_path,
            ignore_keys,
            image_key,
            colorize_nlabels,
            monitor,
            remap,
        )
        self.loss.n_classes = n_embed
        self.vocab_size = n_embed
        self.temperature_scheduler = instantiate_from_config(temperature_scheduler_config)

    def make_quantizer(
        self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int, remap: Any, sane_index_shape: bool
    ) -> nn.Module:
        # The original feeds quant_conv's output (embed_dim wide) to a projection that expects z_channels: both
        # are equal in every published config.
        return GumbelQuantize(ddconfig["z_channels"], embed_dim, n_embed, kl_weight=self._kl_weight, remap=remap)

    def temperature_scheduling(self) -> None:
        """Set the quantiser's temperature for ``self.global_step``."""
        self.quantize.temperature = self.temperature_scheduler(self.global_step)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images -> the quantiser's input."""
        return self.quant_conv(self.encoder(x))

    def outputs(self, batch: Mapping[str, Tensor]) -> Outputs:
        """As in `VQModel`, at the temperature of the current step."""
        self.temperature_scheduling()
        return super().outputs(batch)

    def loss_of(self, outputs: Outputs, optimizer_idx: int = 0, split: str = "train") -> Tensor:
        """As in `VQModel`; reports the temperature of training steps too."""
        loss = super().loss_of(outputs, optimizer_idx, split)
        if split == "train":
            self.log("temperature", self.quantize.temperature)
        return loss
