"""patil-suraj/vqgan-jax, the first stage of dalle-mini: the original's network under flax's names, channels last."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.formats.family import Family, Opened, Source, model_of, renamed
from tamingfast.checkpoints.formats.shapes import ddconfig_of

_KEY = "encoder.conv_in.kernel"
_RULES = (
    (r"^params\.", ""),
    (r"\.(down|up)_(\d+)\.", r".\1.\2."),
    (r"^(\w+\.(?:down|up)\.\d+)\.(block|attn)_(\d+)\.", r"\1.\2.\3."),
    (r"\.embedding\.embedding$", ".embedding.weight"),
    (r"\.(kernel|scale)$", ".weight"),
)
#: What the config says beside the network.
_CODES = ("n_embed", "embed_dim")


def _named(config: Mapping[str, Any]) -> bool:
    return all(key in config for key in ("n_embed", "embed_dim", "ch_mult", "z_channels", "num_res_blocks"))


def _opened(source: Source) -> Opened:
    kernels = {name for name in source.state if name.endswith(".kernel")}
    state: dict[str, Tensor] = renamed(
        {name: value.permute(3, 2, 0, 1) if name in kernels and value.ndim == 4 else value
         for name, value in source.state.items()},
        _RULES,
    )  # fmt: skip
    if source.config is not None and kernels:
        ddconfig = {name: value for name, value in source.config.items() if name in _OF_NETWORK}
        return Opened(model_of({"ddconfig": ddconfig, **{key: source.config[key] for key in _CODES}}), state)
    if source.config is not None:
        raise source.bad("no weights of flax beside a config of vqgan-jax", f"those, such as '{_KEY}'")
    codebook = state.get("quantize.embedding.weight")
    if codebook is None or codebook.ndim != 2:
        raise source.bad("no codebook 'quantize.embedding.embedding'", "all weights of vqgan-jax")
    params = {"ddconfig": ddconfig_of(state, source, "vqgan-jax"), "n_embed": len(codebook)}
    return Opened(model_of({**params, "embed_dim": codebook.shape[1]}), state)


_OF_NETWORK = (
    "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "resamp_with_conv", "in_channels", "out_ch",
    "resolution", "z_channels", "double_z", "give_pre_end",
)  # fmt: skip


def _shown(names: Collection[str]) -> bool:
    return _KEY in names or f"params.{_KEY}" in names


FAMILY = Family("vqgan-jax", _named, _shown, _opened)
