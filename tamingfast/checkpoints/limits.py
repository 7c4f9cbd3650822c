"""How large a model a config asks for, computed from its numbers before anything is built.

A few digits more in a config, and building the model would fill the memory or never end. The counts are upper bounds
of the sizes of the networks in `tamingfast.models`, which are named by strings, as that layer is above this one.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamingfast.checkpoints.targets import class_of, descriptions
from tamingfast.errors import UserError
from tamingfast.ops.backends import available_memory

#: No model has more; each costs time and memory apart from its values.
MOST_TENSORS = 100_000
_BYTES_PER_TENSOR, _BYTES_PER_VALUE = 4096, 4
#: What a model may have beyond twice what its file has: the counts are not exact, and files leave some parts out.
_MORE_TENSORS, _MORE_VALUES = 1000, 10_000_000


@dataclass(frozen=True)
class Size:
    """The number of a network's tensors, and of their values."""

    tensors: int
    values: int

    def __add__(self, other: Size) -> Size:
        return Size(self.tensors + other.tensors, self.values + other.values)

    def __mul__(self, times: int) -> Size:
        return Size(self.tensors * times, self.values * times)


@dataclass(frozen=True)
class _Part:
    """The size of what one ``{target, params}`` of a config describes, without the parts described inside."""

    where: str
    size: Size
    numbers: Mapping[str, int]

    @property
    def largest(self) -> str:
        """The key and value of its largest number."""
        if not self.numbers:
            return self.where
        key = max(self.numbers, key=lambda name: self.numbers[name])
        return f"{self.where}.params.{key}={_rounded(self.numbers[key])}"


def check_sizes(
    config: Mapping[str, Any],
    where: str,
    state: Mapping[str, Tensor] | None = None,
    source: str | os.PathLike = "the checkpoint",
) -> None:
    """Raise UserError, naming the key, for a ``{target, params}`` that asks for more than can be meant.

    That is more than the weights ``state`` from the file ``source`` have; without them, and for losses, which files
    leave out, more than fits into the free memory. ``where`` is the dotted key of ``config``. Numbers that are no whole
    numbers are refused, too.
    """
    parts = list(_parts(config, where))
    network = [part for part in parts if state is None or not _is_loss(part)]
    asked = _total(network)
    if state is not None:
        held = Size(len(state), sum(value.numel() for value in state.values()))
        if asked.tensors > 2 * held.tensors + _MORE_TENSORS or asked.values > 2 * held.values + _MORE_VALUES:
            raise UserError(
                f"{source}: got weights with {held.values} values in {held.tensors} tensors, expected the "
                f"{_rounded(asked.values)} in {_rounded(asked.tensors)} that its config asks for with "
                f"{_largest(network)}; use the config that the checkpoint was trained with"
            )
        parts = [part for part in parts if _is_loss(part)]
    asked = _total(parts)
    free = available_memory(torch.device("cpu"))
    if asked.tensors > MOST_TENSORS or _BYTES_PER_VALUE * asked.values + _BYTES_PER_TENSOR * asked.tensors > free:
        raise UserError(
            f"memory: got too little for {_largest(parts)}, which asks for {_rounded(asked.values)} values in "
            f"{_rounded(asked.tensors)} tensors, expected at most {free // _BYTES_PER_VALUE} in {MOST_TENSORS}"
        )


def _is_loss(part: _Part) -> bool:
    return part.where.endswith(".lossconfig")


def _total(parts: list[_Part]) -> Size:
    return sum((part.size for part in parts), Size(0, 0))


def _largest(parts: list[_Part]) -> str:
    return max(parts, key=lambda part: part.size.values + _BYTES_PER_TENSOR * part.size.tensors).largest


def _rounded(count: int) -> str:
    """A count, which can have thousands of digits, in few."""
    return str(count) if count < 10**9 else f"1e{len(str(count)) - 1}" if count < 10**4000 else "more than 1e4000"


def _parts(config: Mapping[str, Any], where: str) -> Iterator[_Part]:
    for inside, described in descriptions(config, where):
        params = described.get("params")
        network = class_of(described["target"], f"{inside}.target")
        if isinstance(params, Mapping) and network.__module__.startswith("tamingfast.models."):
            numbers = _Numbers(params, f"{inside}.params")
            count = _COUNTS.get(network.__name__, _unknown)
            yield _Part(inside, count(numbers), numbers.seen)


class _Numbers:
    """The whole numbers among the params of a class, under their dotted keys below ``where``."""

    def __init__(self, params: Mapping[str, Any], where: str, seen: dict[str, int] | None = None, prefix: str = ""):
        self.params, self.where, self.prefix = params, where, prefix
        self.seen: dict[str, int] = {} if seen is None else seen

    def get(self, key: str, default: int = 0) -> int:
        """A number, at least 0; ``default`` if it is missing. UserError if it is anything else."""
        value = self.params.get(key, default)
        return 0 if value is None else self._whole(key, value)

    def several(self, key: str, default: tuple[int, ...], fractions: bool = False) -> list[float]:
        """A list of numbers, each at least 0, and whole unless ``fractions`` may be among them."""
        values = self.params.get(key, default)
        if not isinstance(values, list | tuple):
            raise UserError(f"{self.where}.{key}: got {repr(values)[:40]}, expected a list of whole numbers")
        self.seen[f"{self.prefix}{key}"] = len(values)
        return [value if fractions and _is_fraction(value) else self._whole(key, value) for value in values]

    def inside(self, key: str) -> _Numbers:
        """The numbers of a mapping among the params."""
        value = self.params.get(key, {})
        if not isinstance(value, Mapping):
            raise UserError(f"{self.where}.{key}: got {value!r}, expected keys below it")
        return _Numbers(value, f"{self.where}.{key}", self.seen, f"{key}.")

    def all(self) -> list[int]:
        return [self.get(key) for key, value in self.params.items() if type(value) is int and value > 0]

    def _whole(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{self.where}.{key}: got {repr(value)[:40]}, expected a whole number of at least 0")
        self.seen[f"{self.prefix}{key}"] = max(value, self.seen.get(f"{self.prefix}{key}", 0))
        return value


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1 << 20


def _gpt(numbers: _Numbers) -> Size:
    width, layers = numbers.get("n_embd", 256), numbers.get("n_layer", 12)
    numbers.get("n_head", 1)  # only to check that it is a number
    rows = 2 * numbers.get("vocab_size") + numbers.get("block_size")
    return Size(18, 12 * width**2 + 15 * width) * layers + Size(5, (rows + 2) * width)


def _llama_gpt(numbers: _Numbers) -> Size:
    width, layers = numbers.get("n_embd", 768), numbers.get("n_layer", 12)
    numbers.get("n_head", 1)  # only to check that it is a number
    hidden = numbers.get("hidden", 3 * width + 256)
    rows = 2 * numbers.get("vocab_size") + numbers.get("n_classes", 1000) + numbers.get("block_size", 256)
    return Size(8, 4 * width**2 + 3 * width * hidden + 2 * width) * layers + Size(4, (rows + 2) * width)


def _block(before: int, width: int) -> Size:
    """A residual block."""
    return Size(10, 9 * width * (before + width) + before * width + 4 * (before + width))


def _autoencoder(numbers: _Numbers) -> Size:
    """Encoder and decoder of a ``ddconfig``."""
    sides = [
        _Numbers({**numbers.params, **numbers.inside(side).params}, numbers.where, numbers.seen, numbers.prefix)
        for side in ("encoder", "decoder")
    ]
    return _coder(sides[0], numbers.get("in_channels"), extra=0) + _coder(sides[1], numbers.get("out_ch"), extra=1)


def _coder(numbers: _Numbers, channels: int, extra: int) -> Size:
    base, blocks, latents = numbers.get("ch"), numbers.get("num_res_blocks") + extra, numbers.get("z_channels")
    widths = [math.ceil(base * multiplier) for multiplier in numbers.several("ch_mult", (1, 2, 4, 8), fractions=True)]
    numbers.get("resolution")
    attends = bool(numbers.several("attn_resolutions", ()))
    total = Size(0, 0)
    for before, width in zip([base, *widths], widths, strict=False):
        attention = Size(10, 4 * width**2 + 6 * width) * (blocks if attends else 0)
        total += _block(max(before, width), width) + _block(width, width) * max(blocks - 1, 0) + attention
        total += Size(2, 9 * width**2 + width)
    last = max(widths, default=0)
    total += _block(last, last) * numbers.get("mid_blocks", 2) + Size(10, 4 * last**2)
    return total + Size(6, 9 * (base * channels + last * 2 * latents) + 3 * (base + last + latents + channels))


def _first_stage(numbers: _Numbers) -> Size:
    ddconfig = numbers.inside("ddconfig")
    latents, width, codes = ddconfig.get("z_channels"), numbers.get("embed_dim"), numbers.get("n_embed")
    colours = 3 * (numbers.get("n_labels") + numbers.get("colorize_nlabels"))
    total = _autoencoder(ddconfig) + Size(8, 2 * width * (latents + 1) + codes * width + colours)
    return total + (Size(3, width * (width + 1) + codes) if "quantizer_config" in numbers.params else Size(0, 0))


def _fsq(numbers: _Numbers) -> Size:
    numbers.several("levels", ())  # only to check that these are numbers; the model's own say how many codes there are
    return Size(0, 0)


def _steered(numbers: _Numbers) -> Size:
    """A decoder that its codes steer: with projections of them beside each norm, or larger convolutions."""
    ddconfig = numbers.inside("ddconfig")
    numbers.get("n_embed")
    widest = ddconfig.get("ch") * math.ceil(max(ddconfig.several("ch_mult", (8,), fractions=True), default=0))
    projections = Size(4, 4 * widest * (numbers.get("embed_dim") + 1)) * (20 + 10 * ddconfig.get("num_res_blocks"))
    return _autoencoder(ddconfig) * 4 + projections


def _ema(numbers: _Numbers) -> Size:
    return _first_stage(numbers) + Size(2, numbers.get("n_embed") * (numbers.get("embed_dim") + 1))


def _gumbel(numbers: _Numbers) -> Size:
    return _first_stage(numbers) + Size(2, numbers.get("n_embed") * (numbers.inside("ddconfig").get("z_channels") + 1))


def _two_levels(numbers: _Numbers) -> Size:
    bottom = numbers.inside("ddconfig")
    widest = max(bottom.several("ch_mult", (8,)), default=0)
    latents = bottom.get("z_channels")
    top = {**bottom.params, "ch_mult": [widest, widest], "in_channels": latents, "out_ch": latents}
    below = _first_stage(numbers)
    return below + _autoencoder(_Numbers(top, bottom.where)) + below  # more than the second codebook


def _discriminator(numbers: _Numbers, prefix: str = "disc_") -> Size:
    width, layers = numbers.get(f"{prefix}ndf", 64), numbers.get(f"{prefix}num_layers", 3)
    channels = numbers.get(f"{prefix}in_channels", 3)
    widths = [width * 2 ** min(level, 3) for level in range(min(layers, 4) + 1)]
    stages = sum(16 * before * after for before, after in itertools.pairwise(widths))
    rest = 16 * (8 * width) ** 2 * max(layers - 4, 0)
    return Size(5 * layers + 4, stages + rest + 16 * (channels + 8) * width)


def _permutation(numbers: _Numbers) -> Size:
    # Two buffers of int64, and as many temporary arrays as the slowest ordering has.
    return Size(2, 16 * numbers.get("H") * numbers.get("W"))


def _nothing(numbers: _Numbers) -> Size:
    return Size(0, 0)


def _unknown(numbers: _Numbers) -> Size:
    """Any other class of ours, which no sound config names: as if its largest numbers were the sides of a tensor."""
    largest = sorted(numbers.all())[-2:]
    return Size(max(largest, default=0), math.prod(largest)) if largest else Size(0, 0)


_COUNTS: dict[str, Callable[[_Numbers], Size]] = {
    "GPT": _gpt,
    **dict.fromkeys(("VQModel", "VQModelInterface", "VQNoDiscModel", "VQSegmentationModel"), _first_stage),
    "LookupFreeVQModel": _steered,
    "MoVQ": lambda numbers: _steered(numbers) + Size(1, numbers.get("n_embed") * numbers.get("embed_dim")),
    "LlamaGPT": _llama_gpt,
    "EMAVQ": _ema,
    "GumbelVQ": _gumbel,
    "FSQ": _fsq,
    "HierarchicalVQModel": _two_levels,
    "VQLPIPSWithDiscriminator": _discriminator,
    "ColorClusters": lambda numbers: Size(2, 3 * numbers.get("ncluster", 512)),
    **dict.fromkeys(("Subsample", "ZCurve", "SpiralIn", "SpiralOut", "Random", "AlternateParsing"), _permutation),
    **dict.fromkeys(
        (
            "Net2NetTransformer", "MultiscaleTransformer", "DummyLoss", "BCELoss", "BCELossWithQuant", "Identity",
            "Labelator", "SOSProvider", "CoordStage", "DummyCondStage", "LambdaWarmUpCosineScheduler",
            "TableQuantizer", "CosineQuantizer", "SimVQ", "LFQ",
        ),
        _nothing,
    ),
}  # fmt: skip
