"""FoundationVision/LlamaGen's class-conditional transformers, as published: weights without a config, or beside one."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.formats.family import Family, Opened, Source
from tamingfast.errors import UserError

TARGET = "tamingfast.models.llama_gpt.LlamaGPT"
_CLASSES, _QKV = "cls_embedding.embedding_table.weight", "layers.{}.attention.wqkv.weight"
#: (layers, width) -> heads of the published sizes B, L, XL, XXL, XXXL and 3B, which weights do not show.
_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (48, 2560): 40, (24, 3200): 32}
#: Pixels per token of the first stage that they were trained on, and how the published files name the images' size.
_FACTOR, _SIDE = 16, re.compile(r"_(256|384)\.\w+$")
#: Settings of the config that would be another network, and what they must be.
_FIXED = {"model_type": "c2i", "cls_token_num": 1, "norm_eps": 1e-5}


def named(config: Any) -> bool:
    """Whether a config holds the arguments of LlamaGen's transformer."""
    return isinstance(config, Mapping) and {"dim", "n_layer", "n_head", "cls_token_num", "block_size"} <= config.keys()


def shown(names: Collection[str]) -> bool:
    """Whether the names of weights are those of LlamaGen's class-conditional transformer."""
    return _CLASSES in names and _QKV.format(0) in names


def model_of(state: Mapping[str, Tensor], config: Mapping[str, Any] | None, path: str | os.PathLike) -> dict[str, Any]:
    """The ``{target, params}`` config of the weights ``state``, whose names are ours too.

    Without a config the number of heads is that of the published model of this size, and the number of tokens comes
    from the published name. Raises UserError if either is not known, and for a config of another network.
    """
    for name in ("tok_embeddings.weight", _CLASSES, "layers.0.feed_forward.w1.weight", "output.weight"):
        if name not in state or state[name].ndim != 2:
            raise UserError(f"{path}: got no matrix '{name}', expected all weights of LlamaGen's transformer")
    vocab, width = state["tok_embeddings.weight"].shape
    layers = 0
    while _QKV.format(layers) in state:
        layers += 1
    seen = {"dim": width, "n_layer": layers, "vocab_size": vocab, "num_classes": len(state[_CLASSES]) - 1}
    heads, tokens, base = _read(config, seen, path) if config is not None else _published(layers, width, Path(path))
    return {
        "target": TARGET,
        "params": {
            "vocab_size": vocab, "n_classes": seen["num_classes"], "block_size": tokens, "n_layer": layers,
            "n_head": heads, "n_embd": width, "hidden": len(state["layers.0.feed_forward.w1.weight"]),
            "rope_base": base,
        },
    }  # fmt: skip


def _read(config: Mapping[str, Any], seen: Mapping[str, int], path: str | os.PathLike) -> tuple[int, int, float]:
    """Heads, tokens and base of the frequencies by the config, which must fit the weights."""
    for name, value in {**_FIXED, **seen}.items():
        if config.get(name, value) != value:
            raise UserError(f"{name}: got {config[name]!r} in the config of {path}, expected {value!r}")
    heads, tokens, base = config.get("n_head"), config.get("block_size"), config.get("rope_base", 10000)
    for name, number in (("n_head", heads), ("block_size", tokens), ("rope_base", base)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 1:
            raise UserError(f"{name}: got {number!r} in the config of {path}, expected a number of at least 1")
    if config.get("n_kv_head") not in (None, heads):
        raise UserError(f"n_kv_head: got {config['n_kv_head']!r} in the config of {path}, expected none")
    return int(heads or 0), int(tokens or 0), float(base)


def _published(layers: int, width: int, path: Path) -> tuple[int, int, float]:
    """The same of a published file."""
    heads, side = _HEADS.get((layers, width)), _SIDE.search(path.name)
    if heads is None or side is None:
        what = "number of heads" if heads is None else "size of the images"
        raise UserError(
            f"{path}: got LlamaGen's transformer without a config, expected one, as weights do not show the {what}; "
            "put a config.json with its arguments (n_head, block_size, ...) beside it, or keep the published name, as "
            "in c2i_B_256.pt"
        )
    return heads, (int(side[1]) // _FACTOR) ** 2, 10000.0


def _opened(source: Source) -> Opened:
    return Opened(model_of(source.state, source.config, source.path), dict(source.state))


FAMILY = Family("LlamaGen GPT", named, shown, _opened)
