"""Diverging training: stop before bad weights reach the disk, and name the likely cause."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tamingfast.errors import UserError
from tamingfast.training.stage import Batch

#: Share of codes in use below which the codebook has collapsed.
COLLAPSED_USAGE = 0.01
#: If the mean logit of real images is above this and that of fake ones below its negative, the discriminator has won.
SEPARATED_MARGIN = 1.0
#: Number of consecutive validations after which either is worth a hint.
PERSISTS_FOR = 3


class Monitor:
    """Watches one run: `check` and `read` raise UserError, `hints` returns advice for the terminal.

    Reading a value from a GPU waits until the GPU has finished all work. So there the values of ``every`` steps are
    read together, and before anything is written or drawn; bad weights may be moved on by then, but are not saved.
    """

    def __init__(self, learning_rate: float, precision: str, every: int = 1):
        self.learning_rate, self.precision, self.every = learning_rate, precision, every
        self._unread: list[tuple[int, Tensor, Mapping[str, Tensor], Sequence[Batch]]] = []
        self._losses: deque[float] = deque(maxlen=50)
        self._collapsed = 0
        self._separated = 0
        self._given: set[str] = set()

    def check(
        self,
        step: int,
        loss: Tensor | float,
        grad_norm: Tensor | float,
        values: Mapping[str, Tensor],
        batches: Sequence[Batch],
    ) -> None:
        """Note the loss and the gradient norm of a step and, every ``every`` steps, `read` them.

        Called before the optimizer moves; with ``every`` 1 the weights are still those of the step before.
        """
        device = loss.device if isinstance(loss, Tensor) else None
        both = torch.stack([torch.as_tensor(value, device=device).detach().double() for value in (loss, grad_norm)])
        self._unread.append((step, both, values, batches))
        if (step + 1) % self.every == 0:
            self.read()

    def read(self) -> None:
        """Raise UserError with the likely cause unless what was noted since the last time is finite."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        numbers = torch.stack([both for _, both, _, _ in unread]).tolist()
        for (step, _, values, batches), (loss, grad_norm) in zip(unread, numbers, strict=True):
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self._losses.append(loss)
                continue
            seen = {name: float(value) for name, value in values.items()}
            name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
            raise UserError(
                f"{name}: got {value} at step {step}, expected a finite number; {self._cause(seen, batches)}"
            )

    def explain(self, step: int, error: ValueError, batches: Sequence[Batch]) -> None:
        """Raise UserError with the likely cause when ``error`` is an op's refusal of NaN or infinite values."""
        if not isinstance(error, UserError) and re.search(r"\bnan\b|infinit", str(error), re.IGNORECASE):
            raise UserError(
                f"model: got NaN or infinite values inside at step {step}, expected finite ones; "
                f"{self._cause({}, batches)}"
            ) from error

    def _cause(self, values: Mapping[str, float], batches: Sequence[Batch]) -> str:
        """The likely cause and what to do about it, for a step that recorded ``values``."""
        if (bad := non_finite_image(batches)) is not None:
            return f"the image {bad} has NaN or infinite values: remove or repair it, then continue with --resume"
        if values.get("d_weight", 0.0) > 1e3:
            return (
                f"the adaptive discriminator weight has reached {values['d_weight']:.3g}: raise disc_start or lower "
                "disc_weight in model.params.lossconfig.params"
            )
        broken = sorted(name for name, value in values.items() if not math.isfinite(value))
        where = f" (not finite: {', '.join(broken)})" if broken else ""
        if len(self._losses) >= 10 and self._losses[-1] > 2 * min(self._losses) > 0:
            return (
                f"the loss rose from {min(self._losses):.3g} to {self._losses[-1]:.3g} before{where}, so the learning "
                f"rate {self.learning_rate:.3g} is probably too high: set a lower training.learning_rate"
            )
        if self.precision != "float32":
            return f"{self.precision} probably overflowed{where}: try training.precision=float32"
        return (
            f"the learning rate {self.learning_rate:.3g} is probably too high{where}: set a lower "
            "training.learning_rate or training.grad_clip=1.0"
        )

    def hints(self, values: Mapping[str, float]) -> list[str]:
        """Advice after a validation with these ``values``; each hint is given once."""
        self._collapsed = self._collapsed + 1 if values.get("codebook_usage", 1.0) < COLLAPSED_USAGE else 0
        margin = min(values.get("logits_real", 0.0), -values.get("logits_fake", 0.0))
        self._separated = self._separated + 1 if margin > SEPARATED_MARGIN else 0
        found = []
        if self._collapsed >= PERSISTS_FOR:
            found.append(
                f"less than {COLLAPSED_USAGE:.0%} of the codes were used in {PERSISTS_FOR} consecutive validations, so "
                "the codebook has collapsed; a lower learning rate, a smaller n_embed or a larger batch may help"
            )
        if self._separated >= PERSISTS_FOR:
            found.append(
                f"the discriminator clearly told images from reconstructions in {PERSISTS_FOR} consecutive validations "
                "and so teaches the autoencoder little; a later disc_start or a smaller disc_ndf may help"
            )
        fresh = [hint for hint in found if hint not in self._given]
        self._given.update(fresh)
        return fresh


def non_finite_image(batches: Iterable[Batch]) -> str | None:
    """The ``file_path_`` (or the number in its batch) of the first image with NaN or infinite values, or None."""
    for batch in batches:
        images = batch.get("image")
        if not isinstance(images, Tensor) or not images.is_floating_point():
            continue
        bad = (~torch.isfinite(images).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            paths = batch.get("file_path_")
            return str(paths[bad[0]]) if paths else f"number {bad[0]} of the batch"
    return None


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, float32 (); 0 when there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
