"""The config of a first stage, inferred from its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.unpickling import Foreign, Name
from tamingfast.checkpoints.weights import prefixed, shown, unwrapped
from tamingfast.errors import UserError

#: Keys by which weights of a first stage and of a prior are recognised.
KNOWN = ("encoder.conv_in.weight", "transformer.tok_emb.weight", "tok_embeddings.weight")
#: What weights do not show, so that it is assumed.
ASSUMED = "codes are the nearest codebook entries (not chosen by IBQ or another rule), and images end without tanh"
CONFIG_ADVICE = "put it beside the file as <name>.yaml, or give it to `tamingfast convert` with --config"
_MOST_LEVELS, _GROUPS = 16, 32
_MOST_VALUES = 100_000  # beside weights that are searched for signs


def infer_config(state: Mapping[str, Tensor], source: str | os.PathLike = "the checkpoint") -> dict[str, Any]:
    """The ``{target, params}`` config of a VQGAN first stage, from the shapes of its weights.

    Attention resolutions are given for a square input with a latent side of 16; the network is the same for every size.
    Raises UserError for weights of any other network, and for a transformer, whose number of heads cannot be inferred.
    """
    state = unwrapped(state, KNOWN)
    if any(key.startswith("transformer.") for key in state):
        raise UserError(
            f"{source}: got a transformer without a config, expected one with its config, as weights do not show the "
            "number of heads; give its config"
        )
    if "encoder_top.conv_in.weight" in state:
        raise UserError(
            f"{source}: got a first stage of two levels without a config, expected one with its config; give that"
        )
    if any(key.startswith("model_ema.") for key in state):
        raise UserError(
            f"{source}: got averages of the weights (model_ema.*) and no config that says which count, expected its "
            f"config, too; {CONFIG_ADVICE}"
        )
    gumbel = "quantize.embed.weight" in state
    try:
        params = _params(state, gumbel)
    except _OtherNetworkError as error:
        raise UserError(
            f"{source}: got weights of another network ({error}), expected those of a VQGAN of the original's "
            "architecture; give their config if they are"
        ) from None
    params["lossconfig"] = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    kind = "GumbelVQ" if gumbel else "EMAVQ" if "quantize.embedding.cluster_size" in state else "VQModel"
    if gumbel:
        params["temperature_scheduler_config"] = {
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
            "params": {"warm_up_steps": 0, "max_decay_steps": 1, "lr_start": 1.0, "lr_max": 1.0, "lr_min": 1.0},
        }
    elif "colorize" in state and state["colorize"].ndim == 4:
        kind, params["n_labels"] = "VQSegmentationModel", state["colorize"].shape[1]
    return {"target": f"taming.models.vqgan.{kind}", "params": params}


class _OtherNetworkError(Exception):
    """The weights are not those of a VQGAN; the message says by what one sees it."""


def _params(state: Mapping[str, Tensor], gumbel: bool) -> dict[str, Any]:
    def shape(key: str, *expected: int | None) -> tuple[int, ...]:
        """The shape of a weight, which must have these sizes (None: any)."""
        if key not in state:
            elsewhere = prefixed(state, key)
            raise _OtherNetworkError(f"without '{key}'" + (f" but {elsewhere}" if elsewhere else ""))
        found = tuple(state[key].shape)
        if len(found) != len(expected) or any(n not in (None, have) for n, have in zip(expected, found, strict=True)):
            sizes = " x ".join("n" if n is None else str(n) for n in expected)
            raise _OtherNetworkError(f"'{key}' has the shape {found}, not {sizes}")
        return found

    ch, in_channels = shape("encoder.conv_in.weight", None, None, 3, 3)[:2]
    blocks = _count(state, "encoder.down.0.block.{}.conv1.weight")
    levels = _count(state, "encoder.down.{}.block.0.conv1.weight")
    if not 1 <= levels <= _MOST_LEVELS or ch % _GROUPS or not ch:
        raise _OtherNetworkError(f"{levels} levels of {blocks} blocks 'encoder.down', of {ch} channels")
    first = [shape(f"encoder.down.{level}.block.0.conv1.weight", None, None, 3, 3) for level in range(levels)]
    widths = [sizes[0] for sizes in first]
    for level in range(levels):
        for block in range(blocks):
            before = widths[level] if block else widths[level - 1] if level else ch
            shape(f"encoder.down.{level}.block.{block}.conv1.weight", widths[level], before, 3, 3)
    if any(width % ch for width in widths):
        raise _OtherNetworkError(f"widths {widths}, not multiples of {ch}")
    for level in range(levels):
        for block in range(blocks + 1):
            shape(f"decoder.up.{level}.block.{block}.conv1.weight", widths[level], None, 3, 3)
    if not any(key.startswith("quantize.") for key in state) and "quant_conv.weight" in state:
        raise _OtherNetworkError("a KL autoencoder, which has no codebook")
    codebook = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    n_embed, embed_dim = shape(codebook, None, None)
    z_channels = shape("post_quant_conv.weight", None, embed_dim, 1, 1)[0]
    encoded = shape("encoder.conv_out.weight", None, widths[-1], 3, 3)[0]
    shape("quant_conv.weight", embed_dim, None, 1, 1)
    shape("decoder.conv_in.weight", widths[-1], z_channels, 3, 3)
    resolution = 16 * 2 ** (levels - 1)
    attention = [resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state]
    return {
        "embed_dim": embed_dim,
        "n_embed": n_embed,
        "ddconfig": {
            "double_z": encoded == 2 * z_channels, "z_channels": z_channels, "resolution": resolution,
            "in_channels": in_channels, "out_ch": shape("decoder.conv_out.weight", None, widths[0], 3, 3)[0], "ch": ch,
            "ch_mult": [width // ch for width in widths], "num_res_blocks": blocks, "attn_resolutions": attention,
            "dropout": 0.0,
            **({} if "encoder.mid.attn_1.q.weight" in state else {"attn_type": "none"}),
        },
    }  # fmt: skip


def _count(state: Mapping[str, Tensor], key: str) -> int:
    """How many of ``key`` with 0, 1, 2 and so on there are."""
    count = 0
    while key.format(count) in state:
        count += 1
    return count


def check_signs(beside: Mapping[Any, Any], source: str | os.PathLike) -> None:
    """Raise UserError if what lies beside weights without a config shows that they are of a network not inferred here.

    The signs are classes and settings of IBQ, whose weights look like a VQGAN's, and decoders that end in tanh.
    """
    for name, value in _settings(beside):
        ibq = next((text for text in (name, value) if isinstance(text, str) and "ibq" in text.lower()), None)
        if ibq is not None or (name == "tanh_out" and value is True):
            raise UserError(
                f"{source}: got weights without a config beside the setting {shown(ibq or name)}, expected their "
                f"config, as weights do not show that; without it, {ASSUMED}"
            )


def _settings(beside: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Names and values of all that lies beside the weights, however nested, up to a number of values."""
    waiting: list[Any] = [
        {key: value for key, value in beside.items() if key not in ("state_dict", "optimizer_states")}
    ]
    seen: set[int] = set()
    for value in waiting:  # grows
        if id(value) in seen or len(seen) > _MOST_VALUES:
            continue
        seen.add(id(value))
        if isinstance(value, Foreign):
            yield value.name, None
            waiting.append(value.state)
        if isinstance(value, Name):
            yield value.text, None
        pairs = value.items() if isinstance(value, Mapping) else [(None, item) for item in _listed(value)]
        for name, item in pairs:
            # omegaconf keeps a value as the attribute of a node.
            node = item.state if isinstance(item, Foreign) else None
            yield name, node.get("_val", item) if isinstance(node, Mapping) else item
            if isinstance(item, Mapping | list | tuple | Name):
                waiting.append(item)


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else ()
