"""Canvases: grids of tokens of any size, some given and some still to be sampled, that can be edited and resumed.

A token depends on the seed, its place and the tokens that precede it in its window, on nothing else. So a canvas that
is saved half way and sampled to its end later is the one that was never interrupted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamingfast.checkpoints.fingerprint import identity
from tamingfast.errors import UserError
from tamingfast.files import atomic_write
from tamingfast.sampling.sampler import sample_grid
from tamingfast.sampling.waves import check_room

FORMAT = "tamingfast canvas 1"
#: Seconds between saves and previews; each takes at most a tenth of the time however slow it is.
EVERY = 5.0
SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Canvas:
    """Tokens, what is still to be sampled, and all that decides what will be sampled.

    Attributes:
        tokens: int64 (B, height, width); anything where `pending`.
        pending: bool (B, height, width), True where a token is still to be sampled.
        cond: int64 (B, c), the same before every window, (B, height, width), cropped with it, or
            (B, height, width, c), for each window what stands at its upper left corner.
        settings: keyword arguments of `sample_grid` that decide the tokens: window, schedule, stride, temperature,
            top_k, top_p, greedy, seed, first_image, dtype; what is left out has the default there.
        model: `identity` of the model that samples it; empty before it is known.
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
                f"pending is {self.pending.dtype} {tuple(self.pending.shape)} and tokens {tuple(self.tokens.shape)}; "
                "expected bool and integers of one shape (B, height, width)"
            )
        if unknown := set(self.settings) - set(self.SETTINGS):
            raise ValueError(f"settings has {min(unknown)!r}; expected only {', '.join(self.SETTINGS)}")
        batch, height, width = self.tokens.shape
        if len(self.cond) != batch or (self.cond.ndim != 2 and self.cond.shape[:3] != self.tokens.shape):
            got = " x ".join(map(str, self.cond.shape))
            raise UserError(
                f"the condition has {got} tokens, but the canvas needs {batch} x c or {batch} x {height} x {width}: "
                "give a condition of the canvas's size"
            )

    @classmethod
    def blank(cls, cond: Tensor, height: int, width: int, **settings: Any) -> Canvas:
        """A canvas of height x width tokens, all to be sampled, for each row of `cond`.

        Raises UserError for one that memory does not hold, as `outpaint` does.
        """
        check_room(len(cond), height, width)
        shape = (len(cond), height, width)
        return cls(torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool), cond, settings)

    @classmethod
    def of(cls, tokens: Tensor, cond: Tensor, **settings: Any) -> Canvas:
        """A finished canvas of known tokens (B, height, width), to be resampled or outpainted."""
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
                f"the saved canvas has {size} tokens, but {wanted} are asked for: give the same size to go on"
            )
        same = self.cond.shape[1:] == begun.cond.shape[1:]
        if not same or not torch.equal(self.cond[:1], begun.cond[:1].to(self.cond.device)):
            raise UserError("the saved canvas was begun under another condition: give the same one to go on")

    def resample(self, mask: Tensor) -> Canvas:
        """The canvas with the positions that are True in `mask`, bool (height, width) or (B, ...), to be sampled."""
        if mask.dtype != torch.bool or mask.shape not in (self.tokens.shape, self.tokens.shape[1:]):
            raise UserError(
                f"the mask has {' x '.join(map(str, mask.shape))} tokens, but the canvas "
                f"{' x '.join(map(str, self.tokens.shape[1:]))}: give a mask of the canvas's size"
            )
        return replace(self, pending=self.pending | mask.to(self.pending.device))

    def lower_half(self) -> Canvas:
        """The canvas with its lower half to be sampled: the paper's image completion."""
        mask = torch.zeros(self.tokens.shape[1:], dtype=torch.bool)
        mask[mask.shape[0] // 2 :] = True
        return self.resample(mask)

    def outpaint(
        self, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0, cond: Tensor | None = None
    ) -> Canvas:
        """A larger canvas with so many tokens to be sampled around this one.

        A condition that is a grid must be given anew, for the larger canvas. The model reads a window from its upper
        left, so what is added to the right and below continues the image, while what is added above is drawn before
        it and only what lies to the left or right of the image sees its upper rows.
        """
        sides = {"left": left, "right": right, "top": top, "bottom": bottom}
        for name, count in sides.items():
            if count < 0:
                raise UserError(f"{name} is {count} tokens, but a canvas can only grow: give 0 or more")
        batch, height, width = self.tokens.shape
        check_room(batch, height + top + bottom, width + left + right)
        around = (left, right, top, bottom)
        if cond is None and self.cond.ndim > 2 and any(around):
            raise UserError("the canvas is conditioned on a grid: give the condition of the larger canvas")
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
        progress: Callable[[int, int], Any] | None = None,
        every: float = EVERY,
        **options: Any,
    ) -> Canvas:
        """The finished canvas.

        Args:
            model: the prior; a canvas that was begun by another one is refused.
            batch: images at a time, which does not change them.
            path: where the canvas is saved every `every` seconds, and when it is finished or interrupted.
            preview: called with the present canvas as often.
            progress: called as progress(done, total) with sampled and pending tokens over all images.
            options: further arguments of `sample_grid` that do not change the tokens: backend, memory.

        Raises:
            UserError: the model is not the one that began the canvas.
        """
        now = self._begun_by(model)
        tokens, pending = now.tokens.clone(), now.pending.clone()
        current = replace(now, tokens=tokens, pending=pending)
        total, counted = int(pending.sum()), time.monotonic()
        acts = [] if path is None else [lambda: current.save(path)]
        acts += [] if preview is None else [lambda: preview(current)]
        often = [_Regularly(every, act) for act in acts]

        def observe(part: slice, drawn: Tensor, left: Tensor) -> None:
            nonlocal counted
            tokens[part], pending[part] = drawn, left
            if progress is not None and time.monotonic() > counted:
                progress(total - int(pending.sum()), total)
                counted = time.monotonic() + 0.1
            for action in often:
                action.tick()

        settings = dict(now.settings)
        first_image = settings.pop("first_image", 0)
        try:
            for first in range(0, len(tokens), batch):
                part = slice(first, first + batch)
                if not pending[part].any():
                    continue
                sample_grid(
                    model, now.cond[part], *tokens.shape[1:], start=tokens[part], mask=pending[part],
                    first_image=first_image + first, observer=lambda *seen, part=part: observe(part, *seen),
                    **settings, **options,
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
                f"the canvas was begun by model {self.model[:12]}, but this is {name[:12]}: give the same run to go on"
            )
        return replace(self, model=name)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, atomically."""
        from safetensors.torch import save_file

        tensors = {"tokens": self.tokens, "pending": self.pending, "cond": self.cond}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"format": FORMAT, "settings": json.dumps(self.settings), "model": self.model}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Canvas:
        """Read what `save` wrote; UserError when it is missing or no canvas."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.exists():
            raise UserError(f"no canvas at {path}; start without --resume, or give the path of a saved one")
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is no canvas or a damaged one ({error}); give another file") from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is no canvas: its format is {metadata.get('format')!r}, expected {FORMAT!r}")
        return cls(**tensors, settings=json.loads(metadata["settings"]), model=metadata["model"])


class _Regularly:
    """Acts at most every so many seconds, and so rarely that it takes at most `SHARE` of the time."""

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
    """Tokens that a mask of pixels touches: bool (H, W) -> bool (H / factor, W / factor)."""
    height, width = pixels.shape
    if height % factor or width % factor:
        raise UserError(
            f"the mask is {height}x{width} pixels, but this model needs multiples of {factor}: crop or scale it"
        )
    return pixels.view(height // factor, factor, width // factor, factor).any(3).any(1)


def keep_pixels(decoded: Tensor, photo: Tensor, resampled: Tensor) -> Tensor:
    """The photograph where it was kept, the decoded image where tokens were resampled, with a soft seam between.

    Args:
        decoded, photo: (B, 3, H, W) of one size.
        resampled: bool (B, h, w), h and w dividing H and W. The seam lies in the kept tokens beside them, one token
            wide, where the weight of the decoded image falls linearly.
    """
    factor = decoded.shape[-1] // resampled.shape[-1]
    weight = resampled[:, None].to(decoded).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    beside = torch.nn.functional.avg_pool2d(weight, 2 * factor + 1, 1, factor, count_include_pad=False)
    weight = torch.maximum(weight, 2 * beside).clamp(max=1)  # half the square is resampled at an edge
    return photo + weight * (decoded - photo)
