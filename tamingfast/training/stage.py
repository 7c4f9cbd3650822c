"""The interface between the training loop and the models that it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tamingfast.models.base import Module

#: A loss () and values () to record.
Loss = tuple[Tensor, dict[str, Tensor]]
#: A batch of a `tamingfast.data.loader`: tensors and lists with one row per image.
Batch = Mapping[str, Any]


class Stage(Protocol):
    """A model with its optimizers, in the order in which they step."""

    @property
    def model(self) -> Module: ...

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]: ...

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The tensors that the steps change and that using the model needs, by their names in its state dict."""

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the values that the progress bar shows."""

    def loss(self, batch: Batch, index: int) -> Loss | None:
        """What optimizer ``index`` minimizes; None if that optimizer does not move in this step."""

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Values over the validation batches; called in evaluation mode without gradients."""

    def images(self, batch: Batch) -> list[Tensor]:
        """Rows of images (B, C, H, W) in [-1, 1] that show how well the model works; called like `validate`."""


class Optimized(Protocol):
    """A model with Lightning's hook for its optimizers."""

    def configure_optimizers(self) -> Any: ...


def optimizers_of(model: Optimized) -> list[torch.optim.Optimizer]:
    """What ``configure_optimizers`` returns, in any of the forms that Lightning allows, as a list."""
    found = model.configure_optimizers()
    if isinstance(found, tuple):
        found = found[0]
    return list(found) if isinstance(found, list) else [found]
