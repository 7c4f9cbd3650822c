"""Our models in Lightning's `Trainer`; needs the extra ``lightning``.

A module has the state dict of the original's models, so its checkpoints are the original's: `tamingfast.load_model`
opens them with their config, and so does the original's code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tamingfast.models.prior import Net2NetTransformer
from tamingfast.models.vqgan import VQModel

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError(f"tamingfast.training.lightning needs Lightning ({error}): pip install lightning") from error

logger = logging.getLogger(__name__)


class _Module(LightningModule):
    """A model with its optimizers, under the state-dict names of the model itself."""

    def __init__(self, model: Any, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = model.learning_rate = learning_rate

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The model's own, as the original's modules have it."""
        found: dict[str, Any] = self.model.state_dict(*arguments, **options)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the model's own."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    def configure_optimizers(self) -> Any:
        """The model's optimizers, at ``learning_rate``; see its own method of this name."""
        return self.model.configure_optimizers()

    def forward(self, *arguments: Any) -> Any:
        """The model's own."""
        return self.model(*arguments)

    def _log(self, split: str) -> None:
        values = {
            name: value for name, value in self.model.logged.items() if name.startswith(f"{split}/") or "/" not in name
        }
        self.log_dict({name: torch.as_tensor(value).float().mean() for name, value in values.items()})
        self.model.logged.clear()


class VQGANModule(_Module):
    """A first stage in Lightning: both of its optimizers step once a batch, as in the original.

    ``learning_rate`` is the whole rate: in the original, accumulation * devices * batch * ``base_learning_rate``.
    Gradients are accumulated over ``accumulate`` batches; give it here, not to the Trainer, which leaves that to
    modules of more than one optimizer. Batches are mappings with ``image`` (B, H, W, C) in [-1, 1].
    """

    def __init__(self, model: VQModel, learning_rate: float, accumulate: int = 1) -> None:
        super().__init__(model, learning_rate)
        self.automatic_optimization = False
        if accumulate < 1:
            raise ValueError(f"accumulate: got {accumulate}, expected at least 1")
        self.accumulate = accumulate
        self._steps = 0

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One pass and one step for the autoencoder, and one for the discriminator."""
        optimizers = self.optimizers()
        several = optimizers if isinstance(optimizers, list) else [optimizers]
        self.model.global_step = self._steps
        last = (batch_idx + 1) % self.accumulate == 0
        for index, optimizer in enumerate(several):
            self.toggle_optimizer(optimizer)
            loss = self.model.training_step(batch, batch_idx, index) / self.accumulate
            self.manual_backward(loss)
            if last:
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        self._steps += last
        self._log("train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the losses of a batch under ``val/``."""
        self.model.validation_step(batch, batch_idx)
        self._log("val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of steps, which the start of the discriminator depends on."""
        checkpoint["tamingfast_steps"] = self._steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the number of steps back."""
        self._steps = int(checkpoint.get("tamingfast_steps", 0))


class PriorModule(_Module):
    """A prior in Lightning. Batches are mappings with what its ``first_stage_key`` and ``cond_stage_key`` name."""

    def __init__(self, model: Net2NetTransformer, learning_rate: float) -> None:
        super().__init__(model, learning_rate)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The cross entropy of a batch's tokens."""
        loss: Tensor = self.model.training_step(batch, batch_idx)
        self._log("train")
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the cross entropy of a batch under ``val/``."""
        self.model.validation_step(batch, batch_idx)
        self._log("val")
