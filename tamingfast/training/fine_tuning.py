"""Runs that begin with the weights of a trained model instead of random ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tamingfast.checkpoints.config import plain
from tamingfast.checkpoints.infer import KNOWN
from tamingfast.checkpoints.load import load_model, read_as_published
from tamingfast.checkpoints.locate import weights_path
from tamingfast.checkpoints.targets import check_targets
from tamingfast.checkpoints.weights import load_into, unwrapped
from tamingfast.errors import UserError

logger = logging.getLogger(__name__)

#: Params that say how a first stage is trained; all others say what it is.
_OF_TRAINING = ("lossconfig", "monitor")
_LOSS = "loss.discriminator."


class Start:
    """A trained model whose weights a new run begins with, from a checkpoint of any kind that `load_model` opens.

    Raises UserError as `load_model` does, and if the model is not of the ``kind`` that is to be trained.
    """

    def __init__(self, path: str | os.PathLike[str], kind: type[nn.Module], allow: Collection[str] = ()) -> None:
        self.path, self.allow = path, allow
        self.model: Any = load_model(path, device="cpu", allow=allow)
        if not isinstance(self.model, kind):
            raise UserError(
                f"{path}: got a {type(self.model).__name__}, which this stage does not train, expected a "
                f"{kind.__name__}; give a checkpoint of one"
            )

    @property
    def data(self) -> Mapping[str, Any]:
        """The ``data`` section of its config, for a run whose config has none."""
        section = self.model.config.get("data") or {}
        check_targets(section, "data", self.allow)
        return section

    def described(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The ``model`` section of the run: the trained model's, with the loss and the learning rate of ``model``."""
        own, params = plain(self.model.config["model"]), plain(model.get("params")) or {}
        kept = {key: params[key] for key in _OF_TRAINING if key in params}
        # A config without a file, as `infer_config` makes it, has no loss that trains.
        rate = model.get("base_learning_rate") or own.get("base_learning_rate")
        return {"base_learning_rate": rate, "target": own["target"], "params": {**own["params"], **kept}}

    def load(self, model: nn.Module) -> None:
        """Put the weights into the run's model, those of the discriminator too if the checkpoint has one that fits."""
        state = {key: value for key, value in self.model.state_dict().items() if ".loss." not in f".{key}"}
        load_into(model, state, self.path, optional=("loss.", "colorize"))
        loss: Any = getattr(model, "loss", None)
        if not hasattr(loss, "discriminator"):
            return
        found = _discriminator(self.path)
        own = {key: value.shape for key, value in loss.discriminator.state_dict().items()}
        if {key: value.shape for key, value in found.items()} == own:
            load_into(loss.discriminator, found, self.path)
        else:
            logger.warning("%s has no discriminator that fits: a new one is trained", self.path)


def _discriminator(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    state = unwrapped(read_as_published(weights_path(Path(path)))[0].state, KNOWN)
    return {key.removeprefix(_LOSS): value for key, value in state.items() if key.startswith(_LOSS)}
