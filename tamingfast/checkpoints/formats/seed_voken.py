"""TencentARC/SEED-Voken: IBQ, whose network is the original's, and Open-MAGVIT2, which has no codebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tamingfast.checkpoints.config import at
from tamingfast.checkpoints.formats.family import (
    Family,
    Opened,
    Source,
    chosen_weights,
    known_params,
    model_of,
    renamed,
)
from tamingfast.checkpoints.formats.shapes import ddconfig_of
from tamingfast.checkpoints.infer import CONFIG_ADVICE

_LOOKUP_FREE = "tamingfast.models.lookup_free.LookupFreeVQModel"
_IBQ, _IBQ_VQ, _MAGVIT = "IBQ.models.ibqgan.IBQ", "IBQ.models.ibqgan.VQModel", "Open_MAGVIT2.models.lfqgan.VQModel"
_RULES = (
    (r"\.mid_block\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}."),
    (r"\.downsample\.(weight|bias)$", r".downsample.conv.\1"),
    (r"\.upsample\.conv1\.", ".upsample.conv."),
)


def _class(config: Mapping[str, Any]) -> str:
    """The class that a config of Lightning's command line, or of the original's form, names."""
    return str(at(config, "model", "class_path") or at(config, "model", "target"))


def _is(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: _class(config).removeprefix("src.") in names


def _settings(source: Source) -> Mapping[str, Any]:
    found = at(source.config, "model", "init_args") or at(source.config, "model", "params")
    if not isinstance(found, Mapping):
        raise source.bad("no 'init_args' in its config", "those of the class that it names")
    return found


def _opened_ibq(source: Source) -> Opened:
    settings = _settings(source)
    rule = "dot"
    if _is(_IBQ_VQ)(source.config or {}):
        if settings.get("cosine_similarity"):
            raise source.bad("the setting 'cosine_similarity'", "a model that chooses its codes as published")
        rule = "cosine" if settings.get("l2_normalize") else "nearest"
    state = chosen_weights(source, bool(settings.get("use_ema")))
    return Opened(model_of({**known_params(settings), "codes": rule}), state)


def _opened_magvit(source: Source) -> Opened:
    settings: Mapping[str, Any] = {} if source.config is None else _settings(source)
    if source.config is None and any(name.startswith("model_ema.") for name in source.state):
        raise source.bad(
            "averages beside the weights, and no config that says which count", f"its config, too; {CONFIG_ADVICE}"
        )
    state = renamed(chosen_weights(source, bool(settings.get("use_ema"))), _RULES)
    ddconfig = ddconfig_of(state, source, "an Open-MAGVIT2 tokenizer") | {"symmetric": True}
    bits, codes = ddconfig["z_channels"], settings.get("n_embed")
    if codes is not None and codes != 2**bits:
        raise source.bad(f"weights of {bits} bits per token", f"those of its config, whose n_embed is {codes}")
    params = {"ddconfig": ddconfig, "n_embed": 2**bits, "embed_dim": bits}
    return Opened(model_of(params, _LOOKUP_FREE), state)


def _shown_magvit(names: Any) -> bool:
    return "encoder.mid_block.0.conv1.weight" in names and "decoder.adaptive.0.gamma.weight" in names


IBQ = Family("IBQ", _is(_IBQ, _IBQ_VQ), lambda names: False, _opened_ibq)
MAGVIT = Family("Open-MAGVIT2", _is(_MAGVIT), _shown_magvit, _opened_magvit)
