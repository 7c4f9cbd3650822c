"""What all models share: the attributes that code for the original expects, and the interface of a first stage."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tamingfast.checkpoints import pretrained
from tamingfast.checkpoints.hub import Access
from tamingfast.engines import first_stage
from tamingfast.engines.first_stage import Progress
from tamingfast.errors import UserError

#: ``(perplexity, one-hot codes, tokens int64)``; most quantisers give None for the first two.
Info: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor]
#: What the original's ``encode`` returns: quantised latents (B, D, h, w), a loss or None, and `Info`.
Encoded: TypeAlias = tuple[Tensor, Tensor | None, Info]
_Model = TypeVar("_Model", bound="Module")


class Module(nn.Module):
    """A torch module with the attributes that code written for the original reads and sets.

    Attributes:
        learning_rate, global_step: set by the code that trains the model.
        logged: the latest value of each quantity that a training or validation step has logged.
        config: the sections of the model's config, set by `tamingfast.load_model`.
    """

    config: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.0
        self.global_step = 0
        self.logged: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; the CPU if the module has neither."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Store a value in ``logged``; Lightning's other arguments are ignored."""
        self.logged[name] = value.detach() if isinstance(value, Tensor) else value

    def log_dict(self, values: Mapping[str, Any], **kwargs: Any) -> None:
        """Store several values in ``logged``; Lightning's other arguments are ignored."""
        for name, value in values.items():
            self.log(name, value)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        allow: Collection[str] = (),
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> _Model:
        """The model at a path or in a repository of the Hub, as `tamingfast.load_model` gives it.

        The arguments that `load_model` lacks are those of ``huggingface_hub``. Raises UserError as `load_model` does,
        and if the model is none of this class.
        """
        access = Access(revision, cache_dir, token, force_download, local_files_only)
        name = pretrained_model_name_or_path
        found = pretrained.open_pretrained(name, config, device, dtype, allow=allow, access=access)
        if not isinstance(found, cls):
            raise UserError(
                f"{name}: got a {type(found).__name__}, expected a {cls.__name__}; open it with tamingfast.load_model"
            )
        return found

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Path:
        """Write ``config.json``, ``model.safetensors`` and a model card; see `pretrained.save_pretrained`."""
        return pretrained.save_pretrained(self, save_directory, config, figures, dtype=dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
        commit_message: str = "Upload a model of tamingfast",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hub; returns the URL of the commit.

        See `pretrained.push_to_hub`.
        """
        return pretrained.push_to_hub(
            self, repo_id, config, figures, commit_message=commit_message, private=private, token=token, branch=branch,
            create_pr=create_pr,
        )  # fmt: skip


class Codebook(Protocol):
    """The latent vectors that tokens stand for."""

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """Entries of ``indices`` int64 (N,): (B, D, h, w) if ``shape`` is (B, h, w, D), (N, D) if it is None."""


class ConditionStage(Protocol):
    """A module that turns conditions into tokens."""

    training: bool

    def encode(self, c: Tensor, /) -> Encoded:
        """Conditions -> the quantised condition, a loss or None, and `Info` with its tokens."""

    def decode(self, c: Tensor, /) -> Tensor:
        """The inverse of `encode`, from the quantised condition."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""


class FirstStage(Module):
    """Turns images into tokens and back, one token for ``factor`` x ``factor`` pixels.

    Images of (H, W) pixels become (rows, columns) tokens, which a prior models in raster order. ``levels`` is how
    many grids these tokens form, each covering the whole image. With one level, a token's row and column are its place
    in the image.
    """

    levels: int = 1
    image_key: str = "image"  # of its images in a batch

    if TYPE_CHECKING:  # subclasses compute these, set them, or (`quantize`) register them as a submodule

        @property
        def factor(self) -> int:
            """Pixels per token along one side."""

        @property
        def embed_dim(self) -> int:
            """Width of a codebook entry."""

        @property
        def n_embed(self) -> int:
            """Number of token values."""

        @property
        def quantize(self) -> Codebook:
            """The codebook."""

    def encode(self, x: Tensor) -> Encoded:
        """Images (B, C, H, W) -> `Encoded`."""
        raise NotImplementedError

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised latents (B, embed_dim, h, w) -> images (B, C, H, W)."""
        raise NotImplementedError

    def quantised(self, x: Tensor) -> Encoded:
        """Images (B, C, H, W) -> `Encoded`, also where a class's `encode` gives something else."""
        return self.encode(x)

    def decode_quantised(self, quant: Tensor) -> Tensor:
        """Quantised latents (B, embed_dim, h, w) -> images (B, C, H, W), also where `decode` takes something else."""
        return self.decode(quant)

    @torch.no_grad()
    def encode_grid(
        self, x: Tensor, memory: int | None = None, progress: Progress | None = None, engine: str = "auto"
    ) -> Tensor:
        """Images (B, C, H, W) -> tokens int64 (B, rows, columns), without gradients.

        A stage that can work in bands of rows does so if its feature maps exceed ``memory`` bytes (default: half of the
        free memory), and calls ``progress(done, total)``; see `tamingfast.engines.first_stage.run`. Other stages ignore
        both arguments. ``engine`` is "auto", "native" (C++ on the CPU) or "torch".
        """
        return _encode_grid(self, x, engine)

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
        """Tokens int64 (B, rows, columns) -> images (B, C, H, W), without gradients.

        ``memory``, ``progress`` and ``engine`` as for `encode_grid`. With ``dtype`` torch.bfloat16 or torch.float16
        torch computes in it where its autocast does, and with ``memory_format`` torch.channels_last in this layout,
        which matrix units prefer. The images are contiguous, and of the dtype of the weights. Raises UserError for
        other types, and for "native" with a type.
        """
        codes = self.codes_of(grid)
        with first_stage.using(engine, dtype, codes.device.type):
            images = self.decode_quantised(codes.contiguous(memory_format=memory_format))
        return images.to(codes.dtype).contiguous()

    def codes_of(self, grid: Tensor) -> Tensor:
        """Codebook entries (B, embed_dim, rows, columns) of tokens (B, rows, columns)."""
        return _codes(self, grid)

    @property
    def pixels_per_token(self) -> float:
        """Pixels of an image divided by its tokens."""
        return self.factor**2 / math.prod(self.grid(self.factor, self.factor))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of an image of height x width pixels; pixels beyond multiples of ``factor`` are cut off."""
        return height // self.factor, width // self.factor

    def footprint(self, tokens: Tensor) -> Tensor:
        """The pixels that belong to the chosen tokens: bool (B, rows, columns) -> bool (B, 1, H, W)."""
        return tokens[:, None].repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def encode_grid(
    stage: ConditionStage | nn.Module,
    x: Tensor,
    memory: int | None = None,
    progress: Progress | None = None,
    engine: str = "auto",
) -> Tensor:
    """`FirstStage.encode_grid` for any module that has the original's ``encode``, such as a `ConditionStage`."""
    if isinstance(stage, FirstStage):
        return stage.encode_grid(x, memory, progress, engine)
    return _encode_grid(stage, x, engine)


@torch.no_grad()
def decode_grid(
    stage: ConditionStage | nn.Module,
    grid: Tensor,
    memory: int | None = None,
    progress: Progress | None = None,
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """`FirstStage.decode_grid` for any module with ``decode``, ``embed_dim`` and ``quantize.get_codebook_entry``."""
    if isinstance(stage, FirstStage):
        return stage.decode_grid(grid, memory, progress, engine, dtype, memory_format)
    foreign: Any = stage
    codes = _codes(foreign, grid)
    with first_stage.using(engine, dtype, codes.device.type):
        images: Tensor = foreign.decode(codes.contiguous(memory_format=memory_format))
    return images.to(codes.dtype).contiguous()


def quantised(stage: Any, x: Tensor) -> Encoded:
    """`FirstStage.quantised` for any module that has the original's ``encode``."""
    return stage.quantised(x) if isinstance(stage, FirstStage) else stage.encode(x)


@torch.no_grad()
def _encode_grid(stage: Any, x: Tensor, engine: str) -> Tensor:
    with first_stage.using(engine):
        quant, _, (_, _, indices) = quantised(stage, x)
    return indices.view(len(x), *quant.shape[2:])


def _codes(stage: Any, grid: Tensor) -> Tensor:
    """Codebook entries (B, embed_dim, rows, columns) of tokens (B, rows, columns)."""
    if not isinstance(grid, Tensor) or grid.dtype not in (torch.int64, torch.int32) or grid.ndim != 3:
        raise ValueError(f"grid: got {described(grid)}, expected int64 tokens (B, rows, columns)")
    return stage.quantize.get_codebook_entry(grid.reshape(-1), (*grid.shape, stage.embed_dim))


def in_turn(parts: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> Tensor:
    """x through each of the parts; with ``checkpointing``, what a backward pass needs inside them is computed again.

    Only what goes from part to part is kept then (Chen et al. 2016, section 3), and random numbers are drawn alike.
    """
    for part in parts:
        again = checkpointing and torch.is_grad_enabled() and _differentiates(part, x)
        x = checkpoint(part, x, use_reentrant=False) if again else part(x)
    return x


def _differentiates(part: nn.Module, x: Tensor) -> bool:
    return x.requires_grad or any(parameter.requires_grad for parameter in part.parameters())


def described(value: object) -> str:
    """The type and shape of a tensor, the type of anything else: for messages."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def at_least(least: int, **numbers: float) -> None:
    """Raise ValueError for the first of the ``numbers`` that is NaN or below ``least``.

    torch itself silently builds networks of size 0.
    """
    for name, value in numbers.items():
        if not value >= least:  # NaN, too
            raise ValueError(f"{name}: got {value}, expected at least {least}")


def image_from_batch(batch: Mapping[str, Tensor], key: str) -> Tensor:
    """``batch[key]``, of shape (B, H, W, C) or (B, H, W), as a contiguous (B, C, H, W); other ranks are unchanged.

    Raises UserError when the batch lacks it.
    """
    if key not in batch:
        raise UserError(f"data: got items with {', '.join(map(str, batch))}, expected {key!r} among them")
    x = batch[key]
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    return x
