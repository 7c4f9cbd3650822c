"""The first stage: an encoder, a codebook and a decoder (paper section 3.1).

Module names are the original's state-dict keys.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints.config import instantiate_from_config, plain
from tamingfast.checkpoints.load import init_from_ckpt
from tamingfast.engines import first_stage
from tamingfast.errors import UserError
from tamingfast.models.autoencoder import Decoder, Encoder
from tamingfast.models.base import FirstStage, Progress, described, image_from_batch
from tamingfast.models.quantize import EMAVectorQuantizer, GumbelQuantize, Quantised, Quantizer, VectorQuantizer

ADAM_BETAS = (0.5, 0.9)

#: What the original's ``configure_optimizers`` returns: one optimizer, or lists of optimizers and schedulers.
Optimizers: TypeAlias = torch.optim.Optimizer | tuple[list[torch.optim.Optimizer], list[object]]


class Outputs(NamedTuple):
    """What the losses compare: images and reconstructions, both (B, C, H, W), and the codebook loss ()."""

    images: Tensor
    reconstructions: Tensor
    codebook_loss: Tensor


class VQModel(FirstStage):
    """VQGAN: encoder, codebook, decoder and training loss (paper section 3.1).

    ``ddconfig`` goes to `Encoder` and `Decoder`, ``lossconfig`` is a ``{target, params}`` config, the codebook has
    ``n_embed`` entries of width ``embed_dim``. Weights are loaded from ``ckpt_path``, except keys that start with one
    of ``ignore_keys``. Images are in [-1, 1]. ``quantizer_config``, a ``{target, params}`` config, replaces the
    quantiser, usually by one of `tamingfast.models.codebooks`.

    For relatives of the original's networks, whose weights are opened here (docs/families.md): ``ddconfig`` may hold
    mappings ``encoder`` and ``decoder`` of settings for one of the two; ``codes`` is how an entry is chosen
    (`tamingfast.models.quantize.RULES`); ``quant_conv`` False leaves out the 1x1 convolutions around the codebook; with
    ``image_range`` (0, 1) the networks work on these values, while images remain in [-1, 1].
    """

    quantize: Quantizer
    colorize: Tensor

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
        codes: str = "nearest",
        quant_conv: bool = True,
        image_range: tuple[float, float] = (-1, 1),
        quantizer_config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        ddconfig = plain(ddconfig)
        self.image_key, self._rule, self._embed_dim = image_key, codes, embed_dim
        if tuple(image_range) not in ((-1, 1), (0, 1)):
            raise UserError(f"image_range: got {list(image_range)}, expected [-1, 1] or [0, 1]")
        self.image_range = tuple(image_range)
        self.encoder = Encoder(**_of_side(ddconfig, "encoder"))
        self.decoder = self.make_decoder(_of_side(ddconfig, "decoder"))
        self.loss = instantiate_from_config(lossconfig)
        if quantizer_config is None:
            self.quantize = self.make_quantizer(ddconfig, n_embed, embed_dim, remap, sane_index_shape)
        elif remap is not None or codes != "nearest":
            got = f"remap={str(remap)!r}" if remap is not None else f"codes={codes!r}"
            raise ValueError(f"quantizer_config: got {got} beside it, expected one of them")
        else:
            sizes = {"n_embed": n_embed, "embed_dim": embed_dim, "sane_index_shape": sane_index_shape}
            self.quantize = instantiate_from_config(quantizer_config, **sizes)
        latents = ddconfig["z_channels"]
        if not quant_conv and latents != embed_dim:
            raise UserError(f"embed_dim: got {embed_dim}, expected {latents}, z_channels, as there is no quant_conv")
        self.quant_conv = nn.Conv2d(latents, embed_dim, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(embed_dim, latents, 1) if quant_conv else nn.Identity()
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        self.register_load_state_dict_pre_hook(_adopt_colours)
        if monitor is not None:
            self.monitor = monitor
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def make_quantizer(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        remap: str | os.PathLike | None,
        sane_index_shape: bool,
    ) -> Quantizer:
        """Build the quantiser; subclasses override this."""
        return VectorQuantizer(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape, rule=self._rule
        )

    def make_decoder(self, ddconfig: Mapping[str, Any]) -> nn.Module:
        """Build the decoder; subclasses override this."""
        return Decoder(**ddconfig)

    def init_from_ckpt(self, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
        """Load the weights of a checkpoint file; see `tamingfast.checkpoints.load.init_from_ckpt`."""
        init_from_ckpt(self, path, ignore_keys)

    def encode(self, x: Tensor) -> Quantised:
        """Images (B, C, H, W) -> ``(quant (B, embed_dim, h, w), codebook loss, (_, _, indices int64))``.

        Raises ValueError for anything but a floating-point tensor of this shape, in the dtype of the weights.
        """
        return self.quantize(self.latents(x))

    def quantised(self, x: Tensor) -> Quantised:
        """What `encode` gives here, also where a subclass's gives something else."""
        return self.encode(x)

    def latents(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the quantiser's input (B, embed_dim, h, w); raises as `encode`."""
        return self.quant_conv(first_stage.forward(self.encoder, self._to_range(x)))

    def _to_range(self, x: Tensor) -> Tensor:
        """Images as the encoder takes them; what is none is left to the encoder to refuse."""
        shifted = self.image_range == (0, 1) and isinstance(x, Tensor) and x.is_floating_point()
        return (x + 1) / 2 if shifted else x

    def _from_range(self, x: Tensor) -> Tensor:
        return 2 * x - 1 if self.image_range == (0, 1) else x

    @torch.no_grad()
    def encode_grid(
        self, x: Tensor, memory: int | None = None, progress: Progress | None = None, engine: str = "auto"
    ) -> Tensor:
        """Images (B, C, H, W) -> tokens int64 (B, h, w), in bands of rows if feature maps exceed ``memory`` bytes.

        ``engine`` is "auto", "native" (C++ on the CPU) or "torch". Raises UserError if "native" cannot run.
        """
        if not first_stage.describes(self.encoder):
            return super().encode_grid(x, engine=engine)
        if isinstance(self.encoder, Encoder):
            self.encoder.check(x)
        features = first_stage.run(self.encoder, self._to_range(x), memory, progress, engine)
        quant, _, (_, _, indices) = self.quantize(self.quant_conv(features))
        return indices.view(len(x), *quant.shape[2:])

    @torch.no_grad()
    def decode_grid(
        self,
        grid: Tensor,
        memory: int | None = None,
        progress: Progress | None = None,
        engine: str = "auto",
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Tokens (B, h, w) -> images (B, C, f*h, f*w), in bands of rows if feature maps exceed ``memory`` bytes.

        ``engine`` as in `encode_grid`, ``dtype`` and ``memory_format`` as in `FirstStage.decode_grid`.
        """
        if not first_stage.describes(self.decoder):
            return super().decode_grid(grid, None, None, engine, dtype, memory_format)
        codes = self.codes_of(grid)
        with first_stage.using(engine, dtype, codes.device.type):
            z = self.decoder_input(codes.contiguous(memory_format=memory_format))
            decoded = first_stage.run(self.decoder, z, memory, progress)
        return self._from_range(decoded.to(codes.dtype)).contiguous()

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised latents (B, embed_dim, h, w) -> images (B, C, f*h, f*w)."""
        fits = isinstance(quant, Tensor) and quant.is_floating_point() and quant.ndim == 4
        if not fits or quant.shape[1] != self.embed_dim:
            raise ValueError(
                f"quant: got {described(quant)}, expected floating-point latents (B, {self.embed_dim}, h, w) as encode "
                "returns them; decode_code takes tokens"
            )
        return self._from_range(first_stage.forward(self.decoder, self.decoder_input(quant)))

    def decoder_input(self, quant: Tensor) -> Tensor:
        """Quantised latents (B, embed_dim, h, w) -> the decoder's input (B, z_channels, h, w)."""
        return self.post_quant_conv(quant)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Codebook indices -> images: (B, h, w), or (B, n) for a square grid, or (n,) for one square image.

        The original's method calls a function that does not exist.
        """
        if not isinstance(code_b, Tensor):
            raise ValueError(f"code_b: got {described(code_b)}, expected int64 tokens (B, h, w)")
        if code_b.ndim == 1:
            code_b = code_b[None]
        if code_b.ndim == 2:
            side = math.isqrt(code_b.shape[1])
            if side * side != code_b.shape[1]:
                raise ValueError(
                    f"code_b: got {code_b.shape[1]} indices, expected a square number; pass other grids as "
                    "(batch, height, width)"
                )
            code_b = code_b.view(-1, side, side)
        return self.decode_quantised(self.codes_of(code_b))

    @property
    def embed_dim(self) -> int:
        """Width of a codebook entry."""
        return self._embed_dim

    @property
    def unseen(self) -> dict[str, Any]:
        """The settings that weights do not show, by the names of `tamingfast.checkpoints.formats.UNSEEN`."""
        return {
            "codes": getattr(self.quantize, "rule", "nearest"), "image_range": list(self.image_range),
            "ddconfig.tanh_out": getattr(self.decoder, "tanh_out", False),
            "ddconfig.num_groups": self.encoder.norm_out.num_groups,
        }  # fmt: skip

    @property
    def factor(self) -> int:
        """Pixels per token along one side: f = 2^m of the paper."""
        return 2 ** (len(self.encoder.down) - 1)

    @property
    def n_embed(self) -> int:
        """Number of token values: the codebook's entries, or those that ``remap`` keeps."""
        return self.quantize.re_embed

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> ``(reconstructions, codebook loss)``."""
        quant, codebook_loss, _ = self.quantised(input)
        return self.decode_quantised(quant), codebook_loss

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

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Callable[..., object] | Tensor:
        """Report the losses of a batch under ``val/``; returns `log_dict`, as the original does."""
        x = self.get_input(batch, self.image_key)
        self.report(Outputs(x, *self(x)))
        return self.log_dict

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first optimizer: all but the discriminator's."""
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        return [parameter for part in parts for parameter in part.parameters()]

    def configure_optimizers(self) -> Optimizers:
        """``([autoencoder's Adam, discriminator's Adam], [])`` at ``self.learning_rate``."""
        autoencoder = torch.optim.Adam(self.autoencoder_parameters(), lr=self.learning_rate, betas=ADAM_BETAS)
        if not hasattr(self.loss, "discriminator"):
            return [autoencoder], []
        discriminator = torch.optim.Adam(self.loss.discriminator.parameters(), lr=self.learning_rate, betas=ADAM_BETAS)
        return [autoencoder, discriminator], []

    def get_last_layer(self) -> nn.Parameter:
        """The parameter whose gradients set the adaptive weight of the adversarial loss (paper eq. 7)."""
        return cast("nn.Parameter", cast("Decoder", self.decoder).conv_out.weight)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """``inputs`` and ``reconstructions`` (B, 3, H, W), in random colours if there are more than three channels."""
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


def _of_side(ddconfig: Mapping[str, Any], side: str) -> dict[str, Any]:
    """The settings of the encoder or of the decoder (``side``) in a ``ddconfig``."""
    shared = {key: value for key, value in ddconfig.items() if key not in ("encoder", "decoder")}
    own = ddconfig.get(side) or {}
    if not isinstance(own, Mapping):
        raise UserError(f"ddconfig.{side}: got {own!r}, expected settings below it")
    return {**shared, **own}


class VQModelInterface(VQModel):
    """A `VQModel` whose latents are taken before the codebook, as by a diffusion model (latent-diffusion's class).

    ``encode`` gives latents that are not quantised, and ``decode`` quantises them first.
    """

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as in the original
        """Images (B, C, H, W) -> latents (B, embed_dim, h, w), not quantised."""
        return self.latents(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents (B, embed_dim, h, w) -> images (B, C, f*h, f*w); they are quantised unless ``force_not_quantize``."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])

    def quantised(self, x: Tensor) -> Quantised:
        """What `VQModel.encode` gives."""
        return super().encode(x)

    def decode_quantised(self, quant: Tensor) -> Tensor:
        """What `VQModel.decode` gives."""
        return super().decode(quant)


def _adopt_colours(model: VQModel, state: dict[str, Tensor], prefix: str, *args: object) -> None:
    """Load hook: a model registers this buffer only once it has drawn label maps, but its checkpoint may have it."""
    colours = state.get(f"{prefix}colorize")
    if colours is not None and not hasattr(model, "colorize"):
        model.register_buffer("colorize", torch.empty_like(colours, dtype=torch.float32, device=model.device))


class VQSegmentationModel(VQModel):
    """A first stage for label maps with ``n_labels`` channels, trained without a discriminator."""

    def __init__(self, n_labels: int, *args: Any, **kwargs: Any):
        # The buffer must exist before a checkpoint that contains it is loaded.
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
        """As `VQModel.log_images`, with the most likely label at each pixel of the reconstruction."""
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
    """A `VQModel` whose codebook follows exponential moving averages."""

    def make_quantizer(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        remap: str | os.PathLike | None,
        sane_index_shape: bool,
    ) -> Quantizer:
        return EMAVectorQuantizer(n_embed, embed_dim, beta=0.25, remap=remap)

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first optimizer, without the codebook, which has no gradient."""
        return [parameter for parameter in super().autoencoder_parameters() if parameter.requires_grad]


class LambdaWarmUpCosineScheduler:
    """A schedule: linear from ``lr_start`` to ``lr_max``, then a cosine down to ``lr_min`` at ``max_decay_steps``."""

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
    """A `VQModel` with a `GumbelQuantize` whose temperature follows ``temperature_scheduler_config``."""

    quantize: GumbelQuantize

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
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        remap: str | os.PathLike | None,
        sane_index_shape: bool,
    ) -> Quantizer:
        # The original feeds the output of quant_conv, embed_dim wide, to a projection that expects z_channels. The two
        # are equal in every published config.
        return GumbelQuantize(ddconfig["z_channels"], embed_dim, n_embed, kl_weight=self._kl_weight, remap=remap)

    def temperature_scheduling(self) -> None:
        """Set the quantiser's temperature for ``self.global_step``."""
        self.quantize.temperature = self.temperature_scheduler(self.global_step)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images -> the quantiser's input (B, embed_dim, h, w)."""
        return self.quant_conv(first_stage.forward(self.encoder, x))

    def outputs(self, batch: Mapping[str, Tensor]) -> Outputs:
        """As in `VQModel`, at the temperature of the current step."""
        self.temperature_scheduling()
        return super().outputs(batch)

    def loss_of(self, outputs: Outputs, optimizer_idx: int = 0, split: str = "train") -> Tensor:
        """As in `VQModel`; in training, the temperature is reported too."""
        loss = super().loss_of(outputs, optimizer_idx, split)
        if split == "train":
            self.log("temperature", self.quantize.temperature)
        return loss
