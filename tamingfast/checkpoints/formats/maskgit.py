"""MaskGIT-VQGAN of bytedance/1d-tokenizer: a state dict without a config."""

from __future__ import annotations

from collections.abc import Collection

from tamingfast.checkpoints.formats.family import Family, Opened, Source, model_of, renamed
from tamingfast.checkpoints.formats.shapes import ddconfig_of

_WHAT = "a MaskGIT-VQGAN"
_RULES = (
    (r"\.mid\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}."),
    (r"\.upsample_conv\.", ".upsample.conv."),
)


def _shown(names: Collection[str]) -> bool:
    levels = "encoder.down.0.block.0.conv1.weight" in names
    return levels and "encoder.mid.0.conv1.weight" in names and "quant_conv.weight" not in names


def _opened(source: Source) -> Opened:
    state = renamed(source.state, _RULES)
    ddconfig = ddconfig_of(state, source, _WHAT) | {"branch_shortcut": True}
    if len(ddconfig["ch_mult"]) == 1:
        ddconfig["resamp_with_conv"] = False
    codebook = state.get("quantize.embedding.weight")
    if codebook is None or tuple(codebook.shape[1:]) != (ddconfig["z_channels"],):
        raise source.bad("no codebook as wide as the latents", f"all weights of {_WHAT}")
    params = {"ddconfig": ddconfig, "n_embed": codebook.shape[0], "embed_dim": codebook.shape[1]}
    return Opened(model_of({**params, "quant_conv": False, "image_range": [0, 1]}), state)


FAMILY = Family("MaskGIT-VQGAN", lambda config: False, _shown, _opened)
