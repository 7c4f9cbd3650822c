"""Moving averages of the weights (Polyak and Juditsky 1992), with which a run validates, draws and exports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tamingfast.training.settings import Training
from tamingfast.training.stage import Stage


def averages_of(stage: Stage, settings: Training) -> Averages | None:
    """The averages that the settings ask for."""
    return None if settings.ema_decay is None else Averages(stage.averaged, settings.ema_decay)


class Averages:
    """Averages of ``tensors``, by name; they begin as copies, in the same dtypes and on the same devices.

    After step n (from 0) each moves by 1 - d towards its tensor, with d = min(``decay``, (1 + n) / (10 + n)): in the
    first steps an average follows quickly, because the first weights are far from good.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.values = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def follow(self, tensors: Mapping[str, Tensor], place: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Follow other ``tensors`` of the same names; ``place(average, tensor)`` is the average in the new form."""
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.values = {name: place(value, self.tensors[name]) for name, value in self.values.items()}

    def restart(self) -> None:
        """Make them copies of their tensors again."""
        for name, value in self.values.items():
            value.copy_(self.tensors[name])

    def update(self, step: int) -> None:
        """Move the averages after step ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.tensors.values()), 1 - decay)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the block the tensors hold their averages; after it their own values again, bit for bit."""
        own = {name: tensor.clone() for name, tensor in self.tensors.items()}
        try:
            self._fill(self.values)
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(values[name])
