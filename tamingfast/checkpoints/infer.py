"""The config of a first stage, inferred from its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tamingfast.errors import UserError


def infer_config(state: Mapping[str, Tensor], source: str | os.PathLike = "the checkpoint") -> dict[str, Any]:
    """The ``{target, params}`` config of a VQGAN first stage, from the shapes of its weights.

    Attention resolutions are given for a square input with a latent side of 16; the network is the same for every size.
    Raises UserError for unknown keys, and for a transformer, whose number of heads cannot be inferred.
    """
    if any(key.startswith("transformer.") for key in state):
        raise UserError(
            f"{source}: got a transformer without a config, expected one with its config, as weights do not show the "
            "number of heads; give its config"
        )
    if "encoder_top.conv_in.weight" in state:
        raise UserError(
            f"{source}: got a first stage of two levels without a config, expected one with its config; give that"
        )
    if "encoder.conv_in.weight" not in state or "decoder.conv_out.weight" not in state:
        raise UserError(
            f"{source}: got weights without 'encoder.conv_in.weight', expected those of a VQGAN; give their config"
        )
    conv_in, last = state["encoder.conv_in.weight"], state["encoder.conv_out.weight"]
    ch = conv_in.shape[0]
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
    resolution = 16 * 2 ** (levels - 1)
    attention = [resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state]
    z_channels = state["post_quant_conv.weight"].shape[0]
    gumbel = "quantize.embed.weight" in state
    codebook = state["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    params: dict[str, Any] = {
        "embed_dim": codebook.shape[1],
        "n_embed": codebook.shape[0],
        "ddconfig": {
            "double_z": last.shape[0] == 2 * z_channels, "z_channels": z_channels, "resolution": resolution,
            "in_channels": conv_in.shape[1], "out_ch": state["decoder.conv_out.weight"].shape[0], "ch": ch,
            "ch_mult": [width // ch for width in widths], "num_res_blocks": blocks, "attn_resolutions": attention,
            "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
    }  # fmt: skip
    kind = "GumbelVQ" if gumbel else "EMAVQ" if "quantize.embedding.cluster_size" in state else "VQModel"
    if gumbel:
        params["temperature_scheduler_config"] = {
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {"warm_up_steps": 0, "max_decay_steps": 1, "lr_start": 1.0, "lr_max": 1.0, "lr_min": 1.0},
        }
    elif "colorize" in state:
        kind, params["n_labels"] = "VQSegmentationModel", state["colorize"].shape[1]
    return {"target": f"taming.models.vqgan.{kind}", "params": params}
