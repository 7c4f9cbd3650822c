"""Files of weights and their configs: read without running code, turned into models, written by training runs."""

from __future__ import annotations

from tamingfast.checkpoints.convert import convert
from tamingfast.checkpoints.infer import infer_config
from tamingfast.checkpoints.load import load_model
from tamingfast.checkpoints.weights import save_weights

__all__ = ["convert", "infer_config", "load_model", "save_weights"]
