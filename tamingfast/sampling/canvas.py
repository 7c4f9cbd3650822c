"""Canvases: grids of tokens of any size, some given and some still to be sampled, that can be edited and resumed.

A token depends only on the seed, its place and the tokens that precede it in its window. So a canvas that is saved
halfway and finished later equals one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tamingfast.checkpoints.fingerprint import identity
from tamingfast.checkpoints.seal import UNSEALED, check_seal, seal
from tamingfast.engines.networks import token_count
from tamingfast.errors import UserError, first_line
from tamingfast.files import atomic_write, locked, reported, writable_path
from tamingfast.ranks import in_turns, is_first
from tamingfast.sampling.plan import Sampled, describe, plan_grid
from tamingfast.sampling.sampler import image_numbers, sample_grid
from tamingfast.sampling.schedule import WINDOW
from tamingfast.sampling.settings import KINDS, check_settings
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
        name: what messages call it: the file that it was read from.
    """

    tokens: Tensor
    pending: Tensor
    cond: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    name: str = "the canvas"

    SETTINGS = tuple(KINDS)

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.pending.shape != self.tokens.shape or self.pending.dtype != torch.bool:
            raise ValueError(
                f"pending: got {self.pending.dtype} {tuple(self.pending.shape)} for tokens {tuple(self.tokens.shape)}, "
                "expected bool of the same shape (B, height, width)"
            )
        if unknown := set(self.settings) - set(self.SETTINGS):
            raise ValueError(f"settings: got {min(unknown)!r}, expected only {', '.join(self.SETTINGS)}")
        batch, height, width = self.tokens.shape
        image_numbers(self.settings.get("first_image", 0), batch)  # raises
        fixed = self.cond.ndim == 2 and len(self.cond) == batch
        if not fixed and (self.cond.ndim not in (3, 4) or self.cond.shape[:3] != self.tokens.shape):
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
        stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Canvas:
        """The finished canvas, or an unfinished one if it was told to ``stop``.

        Several processes draw its batches in turns, and the first saves it.

        Args:
            model: the prior; it must be the one that began the canvas.
            batch: images sampled at a time; does not change the tokens.
            path: where the canvas is saved every ``every`` seconds, and when it is finished or interrupted.
            preview: called with the current canvas, equally often.
            progress: called as progress(done, total) with numbers of tokens over all images.
            stop: asked whenever tokens were added; from the first True on no more are. Only for one process.
            options: further arguments of `sample_grid` that do not change the tokens: engine, memory, lookahead,
                drafts.

        Raises:
            UserError: another model began the canvas, or one with another vocabulary.
        """
        if not is_first():
            path = preview = progress = None
        now = self._begun_by(model)
        now.check_vocabulary(model)
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
            if stop is not None and stop():
                raise _Stop

        settings = dict(now.settings)
        first_image, (_, height, width) = settings.pop("first_image", 0), tokens.shape
        parts = [slice(first, first + batch) for first in range(0, len(tokens), batch)]
        parts = [part for part in parts if pending[part].any()]

        def draw(part: slice) -> Tensor:
            sample_grid(
                model, now.cond[part], height, width, start=tokens[part], mask=pending[part],
                first_image=first_image + part.start, observer=partial(observe, part), **settings, **options,
            )  # fmt: skip
            return tokens[part].cpu()

        try:
            for part, drawn in zip(parts, in_turns(draw, parts), strict=True):
                tokens[part], pending[part] = drawn, False
        except _Stop:
            pass
        except KeyboardInterrupt:
            if path is not None:
                current.save(path)
            raise
        if path is not None:
            current.save(path)
        if progress is not None:
            progress(total - int(pending.sum()), total)
        return current

    def _begun_by(self, model: nn.Module) -> Canvas:
        name = identity(model)
        if self.model not in ("", name):
            raise UserError(
                f"model: got {name[:12]}, expected {self.model[:12]}, which began {self.name}; give that run to go on"
            )
        return replace(self, model=name)

    def check_vocabulary(self, model: Sampled) -> None:
        """Raise UserError unless the known tokens and those of the condition are ones of ``model``."""
        known, entries = describe(model), token_count(describe(model).gpt.config)
        kept = self.tokens.masked_fill(self.pending, 0)
        for what, tokens, size in (("tokens", kept, known.vocab), ("condition tokens", self.cond, entries)):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= size:
                raise UserError(
                    f"{self.name}: got {what} from {low} to {high}, expected 0 to {size - 1}, the model's; give "
                    "the run that began it"
                )

    def check_windows(self, model: Sampled) -> None:
        """Raise UserError unless ``model`` can draw what is pending under the canvas's own settings."""
        if self.done:
            return
        _, height, width = self.tokens.shape
        layout = {name: value for name, value in self.settings.items() if name in ("window", "schedule", "stride")}
        try:
            plan_grid(model, self.cond[:1], height, width, **layout)
        except ValueError as error:
            wrong = f"{self.name}, {error}"
            raise UserError(wrong) from error

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum, atomically."""
        tensors = {"tokens": self.tokens, "pending": self.pending, "cond": self.cond}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"format": FORMAT, "settings": json.dumps(self.settings), "model": self.model} | UNSEALED
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            seal(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Canvas:
        """Read what `save` wrote; UserError when the file is missing, damaged or not a canvas."""
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: got no file, expected a saved canvas; start without --resume, or give its path")
        check_seal(path)
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except Exception as error:  # whatever safetensors raises
            raise UserError(
                f"{path}: got a damaged file or none of ours ({first_line(error)}), expected a saved canvas; give "
                "another file"
            ) from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: got a file of format {metadata.get('format')!r}, expected {FORMAT!r}")
        try:
            settings = _settings_in(metadata)
            _check_tensors(tensors)
            tokens, cond, pending = tensors["tokens"].long(), tensors["cond"].long(), tensors["pending"]
            # Any other byte than 0 and 1 counts as True in some operations only.
            return cls(tokens, pending.view(torch.uint8) != 0, cond, settings, metadata["model"], str(path))
        except ValueError as error:
            wrong = f"{path}, {error}"
            raise UserError(wrong) from error


@contextlib.contextmanager
def drawing_into(path: str | os.PathLike) -> Iterator[None]:
    """Keep other processes from drawing into the canvas file ``path``; UserError if one is doing so already."""
    target = writable_path(path)
    with reported(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    advice = "wait until it is finished, or give another path"
    with locked(target.with_name(f".{target.name}.lock"), str(path), advice):
        yield


def _settings_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings in a file's metadata; ValueError when they are not what `Canvas.save` writes."""
    for name in ("settings", "model"):
        if name not in metadata:
            raise UserError(f"{name}: got none, expected it in the metadata; give another file")
    try:
        settings = json.loads(metadata["settings"])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"settings: got no JSON ({first_line(error)}), expected an object; give another file"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"settings: got {type(settings).__name__}, expected a JSON object; give another file")
    check_settings({"window": WINDOW} | settings)
    return settings


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless these are a canvas's; that they fit one another is checked by `Canvas`."""
    kinds = {"tokens": "integers", "pending": "bool", "cond": "integers"}
    if tensors.keys() != kinds.keys():
        found = ", ".join(sorted(tensors)) or "none"
        raise UserError(f"tensors: got {found}, expected {', '.join(kinds)}; give another file")
    for name, kind in kinds.items():
        dtype = tensors[name].dtype
        whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
        if not (whole if kind == "integers" else dtype == torch.bool):
            raise UserError(f"{name}: got {dtype}, expected {kind}; give another file")
        if not tensors[name].numel():
            raise UserError(f"{name}: got none, expected at least one; give another file")


class _Stop(Exception):
    """Leaves `sample_grid` from its observer."""


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
