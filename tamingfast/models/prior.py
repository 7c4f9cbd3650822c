"""The prior: a GPT over condition tokens and image tokens in some ordering (paper section 3.2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamingfast.checkpoints.config import instantiate_from_config, plain
from tamingfast.checkpoints.load import init_from_ckpt
from tamingfast.engines.first_stage import beside
from tamingfast.models.base import (
    ConditionStage,
    FirstStage,
    Module,
    Progress,
    at_least,
    decode_grid,
    encode_grid,
    image_from_batch,
    quantised,
)
from tamingfast.models.condition_stages import SOSProvider
from tamingfast.models.gpt import GPT, fed_positions, pick, top_k_logits
from tamingfast.models.orderings import AbstractPermuter, Identity
from tamingfast.models.vqgan import VQModel
from tamingfast.ops.choice import check_filters, scaled
from tamingfast.sampling import sample_grid

#: Values of ``cond_stage_config`` that stand for no config, as in the original.
FIRST_STAGE, UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"
#: Of samples that training shows: the paper's.
TOP_K = 100


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """The original's replacement for a frozen stage's ``train`` method: does nothing."""
    return self


def _frozen(config: Mapping[str, Any] | str) -> Any:
    return instantiate_from_config(config).eval().requires_grad_(False)


class Net2NetTransformer(Module):
    """Autoregressive model of a first stage's tokens given a condition's tokens.

    Configs are ``{target, params}`` mappings. ``cond_stage_config`` may be ``"__is_first_stage__"`` or
    ``"__is_unconditional__"``, which makes the condition one ``sos_token``. All tokens share one vocabulary; the
    ordering of ``permuter_config`` permutes image tokens only. In training each input token is kept with probability
    ``pkeep``, else replaced by one drawn uniformly from the vocabulary, and each image's class is replaced by the null
    class with probability ``class_dropout``, for classifier-free guidance. ``downsample_cond_size`` is the side to
    which spatial conditions are resized before they are encoded.

    Attributes:
        first_stage_model: frozen; may be a foreign module with ``encode``, ``decode``, ``embed_dim`` and
            ``quantize.get_codebook_entry``.
        cond_stage_model: frozen; may be the first stage.
        be_unconditional: whether the condition is the constant ``sos_token``.
    """

    first_stage_model: FirstStage
    cond_stage_model: ConditionStage
    permuter: AbstractPermuter
    transformer: GPT
    be_unconditional: bool

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        permuter_config: Mapping[str, Any] | None = None,
        ckpt_path: str | os.PathLike | None = None,
        ignore_keys: Iterable[str] = (),
        first_stage_key: str = "image",
        cond_stage_key: str = "depth",
        downsample_cond_size: int = -1,
        pkeep: float = 1.0,
        sos_token: int = 0,
        unconditional: bool = False,
        class_dropout: float = 0.0,
    ):
        super().__init__()
        for name, value in (("pkeep", pkeep), ("class_dropout", class_dropout)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: got {value}, expected a probability from 0 to 1")
        self.class_dropout = class_dropout
        self.be_unconditional = unconditional
        self.sos_token = sos_token
        self.first_stage_key, self.cond_stage_key = first_stage_key, cond_stage_key
        self.downsample_cond_size, self.pkeep = downsample_cond_size, pkeep
        self.init_first_stage_from_ckpt(first_stage_config)
        self.init_cond_stage_from_ckpt(cond_stage_config)
        if class_dropout > 0.0 and self.null is None:
            raise ValueError(
                f"class_dropout: got {class_dropout} for a condition without a null class, expected 0; give the "
                "Labelator null_class: true"
            )
        self.permuter = Identity() if plain(permuter_config) is None else instantiate_from_config(permuter_config)
        self.transformer = instantiate_from_config(transformer_config)
        at_least(1, n_layer=self.transformer.config.n_layer)  # without layers a token depends on the last one only
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
        """Load the weights of a checkpoint file; see `tamingfast.checkpoints.load.init_from_ckpt`."""
        init_from_ckpt(self, path, ignore_keys)

    def init_first_stage_from_ckpt(self, config: Mapping[str, Any]) -> None:
        """Build the frozen first stage, with weights from the ``ckpt_path`` in its config, if any."""
        self.first_stage_model = _frozen(config)

    def init_cond_stage_from_ckpt(self, config: Mapping[str, Any] | str) -> None:
        """Set the condition stage: a frozen one of its own, the first stage, or a constant token."""
        if config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        elif config == UNCONDITIONAL or self.be_unconditional:
            self.be_unconditional = True
            self.cond_stage_key = self.first_stage_key
            self.cond_stage_model = cast("ConditionStage", SOSProvider(self.sos_token))  # has nothing to decode
        else:
            self.cond_stage_model = _frozen(config)

    @property
    def null(self) -> int | None:
        """The condition token of no class; None if the condition has none."""
        return getattr(self.cond_stage_model, "null", None)

    def train(self, mode: bool = True) -> Net2NetTransformer:
        """Set the mode of the transformer; the frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        self.cond_stage_model.eval()
        return self

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Images x and conditions c -> ``(logits (B, n, vocab), image tokens int64 (B, n))``."""
        _, z_indices = self.encode_to_z(x)
        _, c_indices = self.encode_to_c(c)
        return self.token_logits(z_indices, c_indices), z_indices

    def token_logits(self, z_indices: Tensor, c_indices: Tensor) -> Tensor:
        """Logits (B, n, vocab) of each image token given the tokens before it and the condition (B, c).

        Output c-1+i belongs to image token i; the last token is never an input. ``pkeep`` and ``class_dropout`` apply
        in training mode.
        """
        inputs = z_indices
        if self.training and self.null is not None and self.class_dropout > 0.0:
            share = torch.full((len(c_indices), 1), self.class_dropout, dtype=torch.float32, device=c_indices.device)
            c_indices = torch.where(torch.bernoulli(share).bool(), self.null, c_indices)
        if self.training and self.pkeep < 1.0:
            keep = torch.bernoulli(
                torch.full(z_indices.shape, self.pkeep, dtype=torch.float32, device=z_indices.device)
            ).bool()
            inputs = torch.where(keep, z_indices, torch.randint_like(z_indices, self.transformer.config.vocab_size))
        logits, _ = self.transformer(torch.cat((c_indices, inputs), dim=1)[:, :-1])
        return logits[:, c_indices.shape[1] - 1 :]

    def top_k_logits(self, logits: Tensor, k: int) -> Tensor:
        """`tamingfast.models.gpt.top_k_logits`."""
        return top_k_logits(logits, k)

    def _draw(self, logits: Tensor, temperature: float, sample: bool, top_k: int | None) -> Tensor:
        logits = scaled(logits, temperature)
        return pick(logits if top_k is None else self.top_k_logits(logits, top_k), sample)

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        c: Tensor,
        steps: int,
        temperature: float = 1.0,
        sample: bool = False,
        top_k: int | None = None,
        callback: Callable[[int], object] = lambda k: None,
    ) -> Tensor:
        """Continue image tokens x (B, k), given condition tokens c (B, c), by ``steps`` tokens: int64 (B, k + steps).

        Takes the most likely token, or with ``sample`` draws one with torch's generator. ``callback(step)`` runs before
        each step. Tokens are in the order of the permuter. `tamingfast.sampling.sample_grid` is faster and seeded.
        Raises RuntimeError in training mode, and UserError for a condition and tokens that need more positions than the
        model's block size (the last token needs none), for an option outside its range, and for logits with NaN.
        """
        if self.transformer.training:
            raise RuntimeError("the model is in training mode; call .eval() before sampling")
        check_filters(temperature, top_k)
        if self.pkeep <= 0.0:
            return self._sample_from_noise(x, c, temperature, sample, top_k)
        sequence = torch.cat((c, x), dim=1)
        gpt, n_unmasked = self.transformer, self.transformer.config.n_unmasked
        positions = fed_positions(gpt, sequence.shape[1], steps)
        # Positions of the unmasked prefix attend to later ones, so nothing can be cached until it is complete.
        cache = gpt.new_cache(len(sequence), positions) if sequence.shape[1] >= n_unmasked else None
        done = 0
        for k in range(steps):
            callback(k)
            if cache is None:
                logits = gpt(sequence)[0]
            else:
                logits = gpt.forward_cached(sequence[:, done:], cache, done)
                done = sequence.shape[1]
            sequence = torch.cat((sequence, self._draw(logits[:, -1:], temperature, sample, top_k)), dim=1)
        return sequence[:, c.shape[1] :]

    def _sample_from_noise(self, x: Tensor, c: Tensor, temperature: float, sample: bool, top_k: int | None) -> Tensor:
        # A model trained with pkeep=0 has never seen a true image token, so it gets noise and samples in one pass.
        # As in the original, the condition's tokens, which look like image tokens, serve as noise.
        noise = c[:, x.shape[1] : -1]
        logits, _ = self.transformer(torch.cat((c, x, noise), dim=1))
        return self._draw(logits, temperature, sample, top_k)[:, c.shape[1] - 1 :]

    def sample_images(self, cond: Tensor, height: int, width: int, **options: Any) -> Tensor:
        """Images (B, 3, f*height, f*width) in [-1, 1] of a grid drawn with `tamingfast.sampling.sample_grid`.

        ``options`` are the arguments of `sample_grid` after the size. Height and width are in tokens. With ``engine``
        "torch" or "naive" torch decodes the tokens, too.
        """
        canvas = sample_grid(self, cond, *self.canvas_size(height, width), **options)
        engine = beside(options.get("backend") or options.get("engine", "auto"))
        return self.decode_grid(self.image_tokens(canvas), engine=engine).clamp(-1, 1)

    def canvas_size(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) that `tamingfast.sampling.sample_grid` draws for an image of height x width tokens."""
        return height, width

    def image_tokens(self, canvas: Tensor) -> Tensor:
        """The part of a sampled canvas (B, rows, columns) that belongs to the image's tokens (B, height, width)."""
        return canvas

    def to_sequence(self, grid: Tensor) -> Tensor:
        """Row-major image tokens (B, h, w) or (B, h*w) -> the sequence (B, n) that the transformer predicts."""
        return self.permuter(grid.flatten(1))

    def to_grid(self, sequence: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `to_sequence`: (B, n) -> (B, height, width)."""
        return self.permuter(sequence, reverse=True).view(-1, height, width)

    def encode_grid(
        self, x: Tensor, memory: int | None = None, progress: Progress | None = None, engine: str = "auto"
    ) -> Tensor:
        """Images (B, C, H, W) -> row-major tokens int64 (B, h, w); see `FirstStage.encode_grid`."""
        return encode_grid(self.first_stage_model, x, memory, progress, engine)

    def decode_grid(
        self,
        grid: Tensor,
        memory: int | None = None,
        progress: Progress | None = None,
        engine: str = "auto",
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Row-major tokens (B, h, w) -> images (B, C, f*h, f*w); see `FirstStage.decode_grid`."""
        return decode_grid(self.first_stage_model, grid, memory, progress, engine, dtype, memory_format)

    def encode_condition(
        self, c: Tensor, memory: int | None = None, progress: Progress | None = None, engine: str = "auto"
    ) -> Tensor:
        """Spatial conditions (B, C, H, W) -> row-major tokens int64 (B, h, w), not resized first."""
        return encode_grid(self.cond_stage_model, c, memory, progress, engine)

    @torch.no_grad()
    def decode_condition(self, grid: Tensor) -> Tensor:
        """Row-major tokens (B, h, w) of a spatial condition -> the condition (B, C, H, W)."""
        stage = self.cond_stage_model
        return decode_grid(stage, grid) if hasattr(stage, "quantize") else stage.decode(grid[:, None].float())

    @torch.no_grad()
    def encode_to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> ``(quantised latents, tokens int64 (B, n) in the order of the permuter)``."""
        quant, _, info = quantised(self.first_stage_model, x)
        return quant, self.to_sequence(info[2].reshape(len(quant), *quant.shape[2:]))

    @torch.no_grad()
    def encode_to_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Conditions in the form that the condition stage takes -> ``(quantised condition, tokens int64 (B, c))``."""
        if self.downsample_cond_size > -1:
            c = F.interpolate(c, size=(self.downsample_cond_size, self.downsample_cond_size))
        quant, _, (_, _, indices) = quantised(self.cond_stage_model, c)
        return quant, indices.reshape(len(c), -1)

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: Sequence[int]) -> Tensor:
        """Tokens in the order of the permuter -> images; ``zshape`` = (B, D, h, w) is the shape of the latents."""
        index = self.to_grid(index.reshape(zshape[0], -1), *zshape[2:])
        quant = self.first_stage_model.quantize.get_codebook_entry(
            index.reshape(-1), (zshape[0], zshape[2], zshape[3], zshape[1])
        )
        stage: Any = self.first_stage_model
        return stage.decode_quantised(quant) if isinstance(stage, FirstStage) else stage.decode(quant)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Tensor],
        temperature: float | None = None,
        top_k: int | None = None,
        callback: Callable[[int], object] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Inputs, reconstructions, conditions and three kinds of samples for the first four images of a batch."""
        x, c = (value.to(self.device) for value in self.get_xc(batch, 4))
        quant_z, z = self.encode_to_z(x)
        quant_c, c_indices = self.encode_to_c(c)
        temperature = 1.0 if temperature is None else temperature
        top_k = min(TOP_K, self.transformer.config.vocab_size) if top_k is None else top_k
        callback = callback or (lambda k: None)
        n = z.shape[1]

        def draw(given: int, sample: bool, top_k: int | None) -> Tensor:
            tokens = self.sample(z[:, :given], c_indices, n - given, temperature, sample, top_k, callback)
            return self.decode_to_img(tokens, quant_z.shape)

        images = {"inputs": x, "reconstructions": self.decode_to_img(z, quant_z.shape)}
        if self.cond_stage_key == "segmentation":
            stage = cast("VQModel", self.cond_stage_model)
            for name, value in (("conditioning_rec", stage.decode(quant_c)), ("conditioning", c)):
                one_hot = F.one_hot(value.argmax(1), c.shape[1]).permute(0, 3, 1, 2).float()
                images[name] = stage.to_rgb(one_hot)
        elif self.cond_stage_key != "image" and not self.be_unconditional:
            images["conditioning_rec"], images["conditioning"] = self.cond_stage_model.decode(quant_c), c
        images["samples_half"] = draw(n // 2, True, top_k)
        images["samples_nopix"] = draw(0, True, top_k)
        images["samples_det"] = draw(0, False, None)
        return images

    def get_input(self, key: str, batch: Mapping[str, Tensor]) -> Tensor:
        """``batch[key]``, with images as (B, C, H, W) and float64 converted to float32."""
        x = image_from_batch(batch, key)
        return x.float() if x.dtype == torch.float64 else x

    def get_xc(self, batch: Mapping[str, Tensor], N: int | None = None) -> tuple[Tensor, Tensor]:
        """The first N images and conditions of a batch."""
        x, c = self.get_input(self.first_stage_key, batch), self.get_input(self.cond_stage_key, batch)
        return x[:N], c[:N]

    def shared_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch's image tokens, in nats per token."""
        logits, target = self(*self.get_xc(batch))
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """`shared_step`, logged as ``train/loss``."""
        loss = self.shared_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """`shared_step`, logged as ``val/loss``."""
        loss = self.shared_step(batch, batch_idx)
        self.log("val/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW(0.9, 0.95) at ``self.learning_rate``, with weight decay 0.01 on the weights of linear layers only."""
        linear = {id(module.weight) for module in self.transformer.modules() if isinstance(module, nn.Linear)}
        # Sorted by name as in the original, whose checkpoints refer to parameters by position.
        named = sorted(self.transformer.named_parameters())
        groups = [
            {"params": [p for _, p in named if id(p) in linear], "weight_decay": 0.01},
            {"params": [p for _, p in named if id(p) not in linear], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
