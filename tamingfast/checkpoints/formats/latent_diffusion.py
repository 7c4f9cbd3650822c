"""CompVis/latent-diffusion: VQ autoencoders, alone or inside a diffusion model; the names are the original's."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tamingfast.checkpoints.config import at
from tamingfast.checkpoints.formats.family import (
    INTERFACE,
    VQMODEL,
    Family,
    Opened,
    Source,
    chosen_weights,
    known_params,
    model_of,
)
from tamingfast.checkpoints.infer import ASSUMED, infer_config

logger = logging.getLogger(__name__)

_PREFIX, _UNET = "first_stage_model.", "model.diffusion_model."
_MODELS = {"ldm.models.autoencoder.VQModel": VQMODEL, "ldm.models.autoencoder.VQModelInterface": INTERFACE}
_WITHOUT_CODEBOOK = {
    "AutoencoderKL": "a KL autoencoder (AutoencoderKL), which has no codebook",
    "IdentityFirstStage": "a diffusion model of pixels (IdentityFirstStage), which has no codebook",
}


def _first_stage(config: Mapping[str, Any]) -> Any:
    """The config of the autoencoder: the model's, or that of its first stage."""
    inside = at(config, "model", "params", "first_stage_config")
    return at(config, "model") if inside is None else inside


def _diffuses(config: Mapping[str, Any]) -> bool:
    # A prior of the original has a first stage, too, and a transformer.
    within = at(config, "model", "params", "first_stage_config") is not None
    return within and at(config, "model", "params", "transformer_config") is None


def _named(config: Mapping[str, Any]) -> bool:
    target = str(at(_first_stage(config), "target"))
    if at(config, "model", "params", "transformer_config") is not None:
        return False
    return _diffuses(config) or target in _MODELS or target.rpartition(".")[2] in _WITHOUT_CODEBOOK


def _shown(names: Collection[str]) -> bool:
    return any(name.startswith(_UNET) for name in names) and any(name.startswith(_PREFIX) for name in names)


def _opened(source: Source) -> Opened:
    inside = {name.removeprefix(_PREFIX): value for name, value in source.state.items() if name.startswith(_PREFIX)}
    state = chosen_weights(replace(source, state=inside or source.state), averaged=False)
    if source.config is None:
        inferred = infer_config(state, source.path)
        logger.warning(
            "no config found for %s; its first stage is inferred from the weights, so %s", source.path, ASSUMED
        )
        return Opened({**inferred, "target": INTERFACE}, state)
    described = _first_stage(source.config)
    target = str(at(described, "target"))
    kind = _WITHOUT_CODEBOOK.get(target.rpartition(".")[2])
    if kind is not None:
        raise source.bad(kind, "a VQ autoencoder")
    if target not in _MODELS:
        raise source.bad(f"a first stage of the class '{target}'", f"one of {', '.join(_MODELS)}")
    params = at(described, "params")
    if not isinstance(params, Mapping):
        raise source.bad(f"no params of '{target}' in its config", "those of a VQ autoencoder")
    # `use_ema` keeps averages, too, but encode and decode use the raw weights.
    return Opened(model_of(known_params(params), _MODELS[target]), state)


FAMILY = Family(
    "latent-diffusion VQ", _named, _shown, _opened, lambda config: _PREFIX if _diffuses(config) else "", whole=False
)
