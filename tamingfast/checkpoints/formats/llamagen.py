"""FoundationVision/LlamaGen's tokenizers, as a file, a training's file or a folder, and inside deepseek-ai/Janus."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.config import at
from tamingfast.checkpoints.formats.family import Family, Opened, Source, model_of, renamed
from tamingfast.checkpoints.formats.shapes import ddconfig_of
from tamingfast.checkpoints.unpickling import Foreign

_KEY = "encoder.conv_blocks.0.res.0.conv1.weight"
_JANUS = "gen_vision_model."
_RULES = (
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^(\w+\.\w+\.\d+)\.res\.", r"\1.block."),
    (r"\.mid\.0\.", ".mid.block_1."), (r"\.mid\.1\.", ".mid.attn_1."), (r"\.mid\.2\.", ".mid.block_2."),
)  # fmt: skip


def _named(config: Mapping[str, Any]) -> bool:
    return "codebook_size" in config and "encoder_ch_mult" in config


def _opened(source: Source) -> Opened:
    state = _our_names(source.state)
    ddconfig = ddconfig_of(state, source, "a LlamaGen tokenizer")
    codebook = state.get("quantize.embedding.weight")
    if codebook is None or codebook.ndim != 2:
        raise source.bad("no codebook 'quantize.embedding.weight'", "all weights of a LlamaGen tokenizer")
    for side in ("encoder", "decoder"):
        widths = at(source.config, f"{side}_ch_mult")
        own = ddconfig.get(side, {}).get("ch_mult", ddconfig["ch_mult"])
        if widths is not None and widths != own:
            raise source.bad(f"weights of {side}_ch_mult {own}", f"those of its config, {widths!r}")
    params = {"ddconfig": ddconfig, "n_embed": codebook.shape[0], "embed_dim": codebook.shape[1]}
    return Opened(model_of({**params, "codes": "unit" if _normalises(source) else "nearest"}), state)


def _our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    places = {int(name.split(".")[2]) for name in state if name.startswith("decoder.conv_blocks.") and _is_place(name)}
    last = max(places, default=0)  # the decoder's levels are stored in the order in which they run
    rules = ((r"^decoder\.conv_blocks\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}"), *_RULES)
    kept = {name: value for name, value in state.items() if name != "quantize.codebook_used"}
    return renamed(kept, rules)


def _is_place(name: str) -> bool:
    return name.split(".")[2].isdecimal()


def _normalises(source: Source) -> bool:
    """Whether codes are of length 1, as by default; only a config or the arguments of a training say otherwise."""
    arguments = source.beside.get("args")
    settings = arguments.state if isinstance(arguments, Foreign) else arguments
    for place in (source.config, settings):
        value = place.get("codebook_l2_norm") if isinstance(place, Mapping) else None
        if value is not None:
            return bool(value)
    return True


def _opened_in_janus(source: Source) -> Opened:
    inside = {name.removeprefix(_JANUS): value for name, value in source.state.items() if name.startswith(_JANUS)}
    return _opened(replace(source, config=None, state=inside or source.state, beside={}))


def _shown_by_janus(names: Collection[str]) -> bool:
    return f"{_JANUS}{_KEY}" in names


FAMILY = Family("LlamaGen VQ", _named, lambda names: _KEY in names, _opened)
JANUS = Family(
    "Janus", lambda config: config.get("model_type") == "multi_modality", _shown_by_janus, _opened_in_janus,
    lambda config: _JANUS,
)  # fmt: skip
