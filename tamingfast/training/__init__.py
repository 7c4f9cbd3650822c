"""Training of both stages (`vqgan.train` and `prior.train`), and the configs that they take."""

from __future__ import annotations

from tamingfast.training.configs import load_config, presets, resumed_config

__all__ = ["load_config", "presets", "resumed_config"]
