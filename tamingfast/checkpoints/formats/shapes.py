"""The ``ddconfig`` of a network, read off the shapes of its weights, which have the original's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tamingfast.checkpoints.formats.family import Source

_LOWEST = 16  # side of the latents of a square image of the side `resolution`, which only says where attention is
_MOST_LEVELS = 16
_GROUPS = 32  # of every norm


def ddconfig_of(state: Mapping[str, Tensor], source: Source, what: str) -> dict[str, Any]:
    """The ``ddconfig`` of an encoder and a decoder, whose levels, widths and blocks may differ.

    Raises UserError, naming the first weight that is missing or has another shape than those of ``what``.
    """
    weights = _Weights(state, source, what)
    encoder, decoder = _side(weights, "encoder", "down"), _side(weights, "decoder", "up")
    if len(encoder["ch_mult"]) != len(decoder["ch_mult"]):
        levels = f"{len(encoder['ch_mult'])} and {len(decoder['ch_mult'])} levels"
        raise source.bad(f"an encoder and a decoder of {levels}", f"those of {what}, with as many each")
    decoder["num_res_blocks"] -= 1  # a decoder has one more than it is told
    latents = weights.shape("decoder.conv_in.weight")[1]
    encoded, _, kernel, _ = weights.shape("encoder.conv_out.weight")
    if encoded != latents:
        raise source.bad(f"an encoder that ends in {encoded} channels", f"the {latents} with which the decoder begins")
    own = {name: value for name, value in decoder.items() if encoder[name] != value}
    shared = {
        "double_z": False, "z_channels": latents, "resolution": _LOWEST * 2 ** (len(encoder["ch_mult"]) - 1),
        "in_channels": weights.shape("encoder.conv_in.weight")[1],
        "out_ch": weights.shape("decoder.conv_out.weight")[0],
        "dropout": 0.0, **encoder,
    }  # fmt: skip
    if kernel != 3:
        shared["out_kernel"] = kernel
    return shared | ({"decoder": own} if own else {})


class _Weights:
    def __init__(self, state: Mapping[str, Tensor], source: Source, what: str) -> None:
        self.state, self.source, self.what = state, source, what

    def shape(self, name: str, dimensions: int = 4) -> tuple[int, ...]:
        found = self.state.get(name)
        if found is None:
            raise self.source.bad(f"no weights '{name}'", f"all those of {self.what}")
        if found.ndim != dimensions or not found.numel():
            raise self.source.bad(f"'{name}' of shape {tuple(found.shape)}", f"the weights of {self.what}")
        return tuple(found.shape)

    def count(self, name: str, first: int = 0) -> int:
        """How many weights of a name with ``first`` and the numbers after it there are."""
        return next(i for i in range(len(self.state) + 1) if name.format(first + i) not in self.state)


def _side(weights: _Weights, side: str, levels_name: str) -> dict[str, Any]:
    place = f"{side}.{levels_name}"
    levels = weights.count(f"{place}.{{}}.block.0.conv1.weight")
    blocks = weights.count(f"{place}.0.block.{{}}.conv1.weight")
    if not 1 <= levels <= _MOST_LEVELS:
        weights.shape(f"{place}.0.block.0.conv1.weight")
        raise weights.source.bad(f"{levels} levels '{place}'", f"at most {_MOST_LEVELS}, as of {weights.what}")
    widths = [weights.shape(f"{place}.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    ch = weights.shape("encoder.conv_in.weight")[0]
    odd = next((width for width in (ch, *widths) if width % _GROUPS), None)
    if odd is not None:
        raise weights.source.bad(f"{odd} channels in the {side}", f"multiples of {_GROUPS}, the groups of a norm")
    top = _LOWEST * 2 ** (levels - 1)
    attends = [top // 2**level for level in range(levels) if f"{place}.{level}.attn.0.q.weight" in weights.state]
    change, changing = ("downsample", 0) if levels_name == "down" else ("upsample", levels - 1)
    found = {
        "ch": ch,
        "ch_mult": multipliers(widths, ch),
        "num_res_blocks": blocks,
        "attn_resolutions": attends,
        "resamp_with_conv": levels == 1 or f"{place}.{changing}.{change}.conv.weight" in weights.state,
        "mid_blocks": weights.count(f"{side}.mid.block_{{}}.conv1.weight", first=1),
    }
    if not found["mid_blocks"]:
        weights.shape(f"{side}.mid.block_1.conv1.weight")
    found["mid_attention"] = f"{side}.mid.attn_1.q.weight" in weights.state
    found["bias"] = f"{place}.0.block.0.conv1.bias" in weights.state
    return found


def multipliers(widths: list[int], ch: int) -> list[int | float]:
    """``ch_mult``: the widths in multiples of ``ch``, whole where they are."""
    return [width // ch if width % ch == 0 else width / ch for width in widths]
