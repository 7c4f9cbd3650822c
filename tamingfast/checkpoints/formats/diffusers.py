"""VQModel of huggingface/diffusers, read and written: a folder of config.json and weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.formats.family import INTERFACE, Family, Opened, Source, model_of, renamed
from tamingfast.checkpoints.formats.shapes import multipliers
from tamingfast.errors import UserError

_CLASS, _KEY = "_class_name", "encoder.down_blocks.0.resnets.0.conv1.weight"
_MOVQ = "tamingfast.models.spatial.MoVQ"
_LOWEST = 16
_KL = "a KL autoencoder, which has no codebook"
_KINDS = dict.fromkeys(("AutoencoderKL", "AsymmetricAutoencoderKL", "FlaxAutoencoderKL"), _KL)
_ATTENTION = {
    "group_norm": "norm", "spatial_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",  # in files of 2022
}  # fmt: skip
_PARTS = "|".join(map(re.escape, _ATTENTION))
_PROJECTIONS = re.compile(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$")


def _named(config: Mapping[str, Any]) -> bool:
    return config.get(_CLASS) == "VQModel" or (_CLASS in config and "_diffusers_version" in config)


def _opened(source: Source) -> Opened:
    config = source.config
    if config is None:
        if not any(name.startswith("quantize.") for name in source.state):
            raise source.bad(f"weights without a codebook, as of {_KL}", "those of a VQModel, beside its config.json")
        raise source.bad(
            "weights of a VQModel of diffusers without a config",
            "its config.json, which says how many groups norms have",
        )
    kind = config.get(_CLASS)
    if kind != "VQModel":
        raise source.bad(_KINDS.get(str(kind), f"a '{kind}' of diffusers"), "a VQModel")
    return Opened(_model(config, source), _our_names(source.state, len(_numbers(config, "block_out_channels", source))))


def _numbers(config: Mapping[str, Any], key: str, source: Source) -> list[int]:
    found = config.get(key)
    if not isinstance(found, list | tuple) or not all(type(n) is int and n > 0 for n in found) or not found:
        raise source.bad(f"{found!r} for '{key}' in its config", "a list of whole numbers")
    return list(found)


def _model(config: Mapping[str, Any], source: Source) -> dict[str, Any]:
    def setting(key: str, default: Any) -> Any:
        value = config.get(key)
        return default if value is None else value

    for key, valid in (("act_fn", ("silu", "swish")), ("norm_type", ("group", "spatial"))):
        if setting(key, valid[0]) not in valid:
            raise source.bad(f"{config[key]!r} for '{key}' in its config", f"one of {', '.join(valid)}")
    widths = _numbers(config, "block_out_channels", source)
    levels = len(widths)
    down = _attends(config, "down_block_types", "DownEncoderBlock2D", levels, source)
    up = _attends(config, "up_block_types", "UpDecoderBlock2D", levels, source)[::-1]
    top = _LOWEST * 2 ** (levels - 1)
    sides = [[top // 2**level for level, attends in enumerate(side) if attends] for side in (down, up)]
    latents = setting("latent_channels", 3)
    ddconfig = {
        "double_z": False, "z_channels": latents, "resolution": top, "in_channels": setting("in_channels", 3),
        "out_ch": setting("out_channels", 3), "ch": widths[0], "ch_mult": multipliers(widths, widths[0]),
        "num_res_blocks": setting("layers_per_block", 1), "attn_resolutions": sides[0], "dropout": 0.0,
        "num_groups": setting("norm_num_groups", 32), "mid_attention": bool(setting("mid_block_add_attention", True)),
    }  # fmt: skip
    if sides[1] != sides[0]:
        ddconfig["decoder"] = {"attn_resolutions": sides[1]}
    params = {
        "ddconfig": ddconfig,
        "n_embed": setting("num_vq_embeddings", 256),
        "embed_dim": setting("vq_embed_dim", latents),
    }
    # aMUSEd alone looks codes up, and its pipeline alone gives the network values in [0, 1].
    if config.get("lookup_from_codebook"):
        params["image_range"] = [0, 1]
    spatial = setting("norm_type", "group") == "spatial"
    if spatial and params["embed_dim"] != latents:
        raise source.bad(f"codes of {params['embed_dim']} channels", f"the {latents} of its latents, as of MoVQ")
    return model_of(params, _MOVQ if spatial else INTERFACE)


def _attends(config: Mapping[str, Any], key: str, plain: str, levels: int, source: Source) -> list[bool]:
    """For each block of a list in the config whether it has attention."""
    names = config.get(key)
    names = [plain] * levels if names is None else names
    known = {plain: False, f"Attn{plain}": True}
    if not isinstance(names, list | tuple) or len(names) != levels or any(name not in known for name in names):
        raise source.bad(f"{names!r} for '{key}' in its config", f"{levels} of {' and '.join(known)}")
    return [known[name] for name in names]


def _our_names(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"\.up_blocks\.(\d+)", lambda found: f".up.{levels - 1 - int(found[1])}"),
        (r"\.down_blocks\.", ".down."),
        (r"\.mid_block\.resnets\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (rf"(\.attn(?:_1|\.\d+))\.({_PARTS})\.", lambda found: f"{found[1]}.{_ATTENTION[found[2]]}."),
    ]
    return {
        name: value[:, :, None, None] if _PROJECTIONS.search(name) and value.ndim == 2 else value
        for name, value in renamed(state, rules).items()
    }


def _shown(names: Collection[str]) -> bool:
    return _KEY in names


FAMILY = Family("diffusers VQModel", _named, _shown, _opened)


# --- written ----------------------------------------------------------------------------------------------------------

#: Settings of a ``ddconfig`` with which diffusers builds another network, or none, and their defaults here.
_SAME = {
    "double_z": False, "resamp_with_conv": True, "tanh_out": False, "bias": True, "branch_shortcut": False,
    "symmetric": False, "out_kernel": 3, "mid_blocks": 2, "give_pre_end": False, "use_linear_attn": False,
}  # fmt: skip
_THEIR_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
CLASSES = ("VQModel", "VQModelInterface", "VQNoDiscModel", "EMAVQ")


def written(params: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the weights of a model of ours, one of `CLASSES`, as diffusers' VQModel has them.

    ``params`` are those of its config. Raises UserError, naming the setting, for a network that VQModel cannot be.
    """
    ddconfig = dict(params["ddconfig"])
    own = {name: value for name, value in (ddconfig.pop("decoder", None) or {}).items() if name != "attn_resolutions"}
    own |= ddconfig.pop("encoder", None) or {}
    odd: dict[str, Any] = {"codes": params["codes"]} if params.get("codes", "nearest") != "nearest" else {}
    odd |= {
        f"ddconfig.{name}": ddconfig[name]
        for name, same in _SAME.items()
        if ddconfig.get(name, same) not in (same, None)
    }
    odd |= {f"a {name} of one side": value for name, value in own.items()}
    odd |= {"quant_conv": False} if not params.get("quant_conv", True) else {}
    odd |= {"ddconfig.ch_mult": ddconfig["ch_mult"]} if ddconfig["ch_mult"][0] != 1 else {}
    odd |= {"remap": "a part of the codebook"} if "quantize.used" in state else {}
    if odd:
        name, value = next(iter(odd.items()))
        raise UserError(
            f"layout: got 'diffusers' for a model with {name}={value}, expected one that its VQModel can be"
        )
    return _config(params, ddconfig), _their_names(state, len(ddconfig["ch_mult"]))


def _config(params: Mapping[str, Any], ddconfig: Mapping[str, Any]) -> dict[str, Any]:
    widths = [round(ddconfig["ch"] * multiplier) for multiplier in ddconfig["ch_mult"]]
    some = ddconfig.get("attn_type") != "none"
    sides = [ddconfig["attn_resolutions"], (params["ddconfig"].get("decoder") or ddconfig)["attn_resolutions"]]
    down, up = ([some and ddconfig["resolution"] // 2**level in side for level in range(len(widths))] for side in sides)
    return {
        _CLASS: "VQModel", "_diffusers_version": "0.30.0", "act_fn": "silu", "block_out_channels": widths,
        "down_block_types": [f"{'Attn' if attends else ''}DownEncoderBlock2D" for attends in down],
        "up_block_types": [f"{'Attn' if attends else ''}UpDecoderBlock2D" for attends in reversed(up)],
        "in_channels": ddconfig["in_channels"], "out_channels": ddconfig["out_ch"],
        "latent_channels": ddconfig["z_channels"], "layers_per_block": ddconfig["num_res_blocks"],
        "mid_block_add_attention": bool(some and ddconfig.get("mid_attention", True)),
        "norm_num_groups": ddconfig.get("num_groups", 32), "norm_type": "group", "sample_size": ddconfig["resolution"],
        "num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"],
        "lookup_from_codebook": list(params.get("image_range", (-1, 1))) == [0, 1],
    }  # fmt: skip


def _their_names(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    attention = "|".join(_THEIR_ATTENTION)
    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (rf"(\.attn(?:_1|\.\d+))\.({attention})\.", lambda found: f"{found[1]}.{_THEIR_ATTENTION[found[2]]}."),
        (r"\.up\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}."),
        (r"\.down\.", ".down_blocks."),
        (r"\.mid\.block_(\d+)\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ]
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.weight")
    kept = {
        name: value.flatten(1) if _PROJECTIONS.search(name) else value
        for name, value in state.items()
        if name.startswith(parts)
    }
    return renamed(kept, rules)
