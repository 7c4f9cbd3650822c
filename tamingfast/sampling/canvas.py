"""Canvases: grids of tokens of any size, some given and some still to be sampled, that can be edited and resumed.

A token depends only on the seed, its place and the tokens that precede it in its window. So a canvas that is saved
halfway and finished later equals one that was never interrupted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tamingfast.checkpoints.fingerprint import identity
from tamingfast.errors import UserError
from tamingfast.files import atomic_write
from tamingfast.sampling.sampler import sample_grid
from tamingfast.sampling.waves import check_room

FORMAT = "tamingfast canvas 1"
#: Seconds between saves and between previews, and the largest share of the time that each may take.
EVERY = 5.0
SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Canvas:
    """Tokens, which of them are still to be sampled, and everything that decides what they will be.

    Attributes:
        tokens: int64 (B, height, width); arbitrary where `pending`.
        pending: bool (B, height, width), True where a token is still to be sampled.
        cond: int64 (B, c), the same before every window; (B, height, width), cropped with it; or
            (B, height, width, c), which gives each window the entry at its upper left corner.
        settings: the keyword arguments of `sample_grid` named in `SETTINGS`, which decide the tokens; those left out
            have their defaults.
        model: `identity` of the model that samples it; empty before that is known.
    """

    tokens: Tensor
    pending: Tensor
    cond: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""

    SETTINGS = (
        "window",
        "schedule",
        "stride",
        "temperature",
        "top_k",
        "top_p",
        "greedy",
        "seed",
        "first_image",
        "dtype",
    )

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.pending.shape != self.tokens.shape or self.pending.dtype != torch.bool:
            raise ValueError(
                f"pending: got {self.pending.dtype} {tuple(self.pending.shape)} for tokens {tuple(self.tokens.shape)}, "
                "expected bool of the same shape (B, height, width)"
            )
        if unknown := set(self.settings) - set(self.SETTINGS):
            raise ValueError(f"settings: got {min(unknown)!r}, expected only {', '.join(self.SETTINGS)}")
        batch, height, width = self.tokens.shape
        if len(self.cond) != batch or (self.cond.ndim != 2 and self.cond.shape[:3] != self.tokens.shape):
            got = " x ".join(map(str, self.cond.shape))
            raise UserError(
                f"condition: got {got} tokens, expected {batch} x c or {batch} x {height} x {width}; give one of the "
                "canvas's size"
            )

    @classmethod
    def blank(cls, cond: Tensor, height: int, width: int, **settings: Any) -> Canvas:
        """A canvas of height x width tokens, all to be sampled, for each row of ``cond``.

        Raises UserError when it does not fit into memory, as `outpaint` does.
        """
        check_room(len(cond), height, width)
        shape = (len(cond), height, width)
        tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
        return cls(tokens, torch.ones_like(tokens, dtype=torch.bool), cond, settings)

    @classmethod
    def of(cls, tokens: Tensor, cond: Tensor, **settings: Any) -> Canvas:
        """A finished canvas of known tokens (B, height, width), ready to be resampled or outpainted."""
        return cls(tokens, torch.zeros_like(tokens, dtype=torch.bool), cond, settings)

    @property
    def done(self) -> bool:
        """Whether nothing is pending."""
        return not bool(self.pending.any())

    def check_begun_as(self, begun: Canvas) -> None:
        """UserError unless this canvas, from a file, has the size and the condition of ``begun``, from a command."""
        size, wanted = (" x ".join(map(str, canvas.tokens.shape[1:])) for canvas in (self, begun))
        if size != wanted:
            raise UserError(
                f"size: got {wanted} tokens, expected the {size} of the saved canvas; give the same size to go on"
            )
        same = self.cond.shape[1:] == begun.cond.shape[1:]
        if not same or not torch.equal(self.cond[:1], begun.cond[:1].to(self.cond.device)):
            raise UserError(
                "condition: got a different one from the saved canvas's, expected the same; give the same to go on"
            )

    def resample(self, mask: Tensor) -> Canvas:
        """The canvas with the cells that are True in ``mask``, bool (height, width) or (B, ...), to be resampled."""
        if mask.dtype != torch.bool or mask.shape not in (self.tokens.shape, self.tokens.shape[1:]):
            raise UserError(
                f"mask: got {' x '.join(map(str, mask.shape))} tokens, expected "
                f"{' x '.join(map(str, self.tokens.shape[1:]))}; give a mask of the canvas's size"
            )
        return replace(self, pending=self.pending | mask.to(self.pending.device))

    def outpaint(
        self, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, cond: Tensor | None = None
    ) -> Canvas:
        """This canvas, enlarged on each side by the given number of rows or columns of tokens to be sampled.

        A condition that is a grid must be given anew, for the larger canvas. The model reads a window from its upper
        left corner. So tokens to the right and below continue the image, while tokens above are drawn before the model
        has seen it.
        """
        sides = {"left": left, "right": right, "top": top, "bottom": bottom}
        for name, count in sides.items():
            if count < 0:
                raise UserError(f"{name}: got {count} tokens, expected 0 or more, as a canvas can only grow")
        batch, height, width = self.tokens.shape
        check_room(batch, height + top + bottom, width + left + right)
        around = (left, right, top, bottom)
        if cond is None and self.cond.ndim > 2 and any(around):
            raise UserError(
                "condition: got none, expected one of the larger canvas, as the canvas is conditioned on a grid"
            )
        pad = torch.nn.functional.pad
        return replace(
            self,
            tokens=pad(self.tokens, around),
            pending=pad(self.pending, around, value=True),
            cond=self.cond if cond is None else cond,
        )

    def sample(
        self,
        model: nn.Module,
        *,
        batch: int = 16,
        path: str | os.PathLike | None = None,
        preview: Callable[[Canvas], None] | None = None,
        progress: Callable[[int, int], object] | None = None,
        every: float = EVERY,
        **options: Any,
    ) -> Canvas:
        """The finished canvas.

        Args:
            model: the prior; it must be the one that began the canvas.
            batch: images sampled at a time; does not change the tokens.
            path: where the canvas is saved every ``every`` seconds, and when it is finished or interrupted.
            preview: called with the current canvas, equally often.
            progress: called as progress(done, total) with numbers of tokens over all images.
            options: further arguments of `sample_grid` that do not change the tokens: engine, memory.

        Raises:
            UserError: another model began the canvas.
        """
        now = self._begun_by(model)
        tokens, pending = now.tokens.clone(), now.pending.clone()
        current = replace(now, tokens=tokens, pending=pending)
        total, counted = int(pending.sum()), time.monotonic()
        often: list[_Regularly] = []
        if path is not None:
            often.append(_Regularly(every, partial(current.save, path)))
        if preview is not None:
            often.append(_Regularly(every, partial(preview, current)))

        def observe(part: slice, drawn: Tensor, left: Tensor) -> None:
            nonlocal counted
            tokens[part], pending[part] = drawn, left
            if progress is not None and time.monotonic() > counted:
                progress(total - int(pending.sum()), total)
                counted = time.monotonic() + 0.1
            for action in often:
                action.tick()

        settings = dict(now.settings)
        first_image, (_, height, width) = settings.pop("first_image", 0), tokens.shape
        try:
            for first in range(0, len(tokens), batch):
                part = slice(first, first + batch)
                if not pending[part].any():
                    continue
                sample_grid(
                    model, now.cond[part], height, width, start=tokens[part], mask=pending[part],
                    first_image=first_image + first, observer=partial(observe, part), **settings, **options,
                )  # fmt: skip
        except KeyboardInterrupt:
            if path is not None:
                current.save(path)
            raise
        if path is not None:
            current.save(path)
        if progress is not None:
            progress(total, total)
        return current

    def _begun_by(self, model: nn.Module) -> Canvas:
        name = identity(model)
        if self.model not in ("", name):
            raise UserError(
                f"model: got {name[:12]}, expected {self.model[:12]}, which began the canvas; give that run to go on"
            )
        return replace(self, model=name)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, atomically."""
        tensors = {"tokens": self.tokens, "pending": self.pending, "cond": self.cond}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"format": FORMAT, "settings": json.dumps(self.settings), "model": self.model}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Canvas:
        """Read what `save` wrote; UserError when the file is missing, damaged or not a canvas."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: got no file, expected a saved canvas; start without --resume, or give its path")
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"{path}: got a damaged file or none of ours ({error}), expected a saved canvas; give another file"
            ) from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: got a file of format {metadata.get('format')!r}, expected {FORMAT!r}")
        return cls(**tensors, settings=json.loads(metadata["settings"]), model=metadata["model"])


class _Regularly:
    """Calls ``act`` at most once per ``every`` seconds, and rarely enough to take at most `SHARE` of the time."""

    def __init__(self, every: float, act: Callable[[], None]) -> None:
        self.every, self.act = every, act
        self.due = time.monotonic() + every

    def tick(self) -> None:
        begun = time.monotonic()
        if begun >= self.due:
            self.act()
            ended = time.monotonic()
            self.due = ended + max(self.every, (ended - begun) / SHARE)


def token_mask(pixels: Tensor, factor: int) -> Tensor:
    """Tokens that a pixel mask touches: bool (H, W) -> bool (H / factor, W / factor)."""
    height, width = pixels.shape
    if height % factor or width % factor:
        raise UserError(
            f"mask: got {height}x{width} pixels, expected multiples of {factor} for this model; crop or scale it"
        )
    return pixels.view(height // factor, factor, width // factor, factor).any(3).any(1)


def keep_pixels(decoded: Tensor, photo: Tensor, resampled: Tensor) -> Tensor:
    """The photograph where it was kept and the decoded image where tokens were resampled, with a soft seam.

    Args:
        decoded, photo: (B, 3, H, W) of one size.
        resampled: bool (B, h, w), h and w dividing H and W. The seam is one token wide and lies in the kept tokens
            beside the resampled ones; across it the weight of the decoded image falls linearly.
    """
    factor = decoded.shape[-1] // resampled.shape[-1]
    weight = resampled[:, None].to(decoded).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    beside = torch.nn.functional.avg_pool2d(weight, 2 * factor + 1, 1, factor, count_include_pad=False)
    weight = torch.maximum(weight, 2 * beside).clamp(max=1)  # half the square is resampled at an edge
    return photo + weight * (decoded - photo)
