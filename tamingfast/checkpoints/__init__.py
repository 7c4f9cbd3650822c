"""Files of weights and what lies beside them: reading them safely, configs, models from them, run directories."""

from __future__ import annotations

from tamingfast.checkpoints.load import convert, infer_config, load_model, save_weights

__all__ = ["convert", "infer_config", "load_model", "save_weights"]
