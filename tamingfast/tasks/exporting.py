"""The networks of a model as programs that run without this package: `export`."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tamingfast.errors import UserError, nearest
from tamingfast.files import atomic_write, check_directory, reported, write_json
from tamingfast.models.base import FirstStage
from tamingfast.models.quantize import GumbelQuantize
from tamingfast.progress import Bars, silent
from tamingfast.tasks.models import Model, first_stage_of, unread

#: Values of ``format`` -> the suffix of the files.
FORMATS = {"torch": ".pt2", "onnx": ".onnx"}
DESCRIPTION = "networks.json"
#: Rows and columns of tokens that are traced, and other ones on which the result is checked.
_TRACED, _CHECKED = (2, 6, 5), (1, 4, 9)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST_ONNX = 2 * 10**9  # bytes of one file of protocol buffers
#: What may differ from the model: images in [-1, 1] and logits, relative to the largest value; and the share of tokens,
#: which near-ties of two codes decide.
_TOLERANCE, _OTHER_TOKENS = 1e-3, 1e-2


@dataclass(frozen=True)
class Exported:
    """One network that was written, and how far the file's results are from the model's."""

    file: str
    input: str
    output: str
    difference: float


@dataclass(frozen=True)
class _Network:
    """A network with one input: its meaning, the shapes that may vary, and inputs of given (batch, rows, columns)."""

    module: nn.Module
    input: str
    output: str
    dims: dict[int, Any]
    sample: Callable[[tuple[int, int, int]], Tensor]


class _Encoder(nn.Module):
    """Images (B, C, H, W) -> tokens int64 (B, rows, columns); of `GumbelQuantize` the likeliest, without noise."""

    def __init__(self, stage: FirstStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, images: Tensor) -> Tensor:
        stage: Any = self.stage
        if isinstance(stage.quantize, GumbelQuantize):
            logits = stage.quantize.proj(stage.encode_to_prequant(images))
            return (logits if stage.quantize.remap is None else logits[:, stage.quantize.used]).argmax(1)
        tokens = stage.encode(images)[2][2]
        return tokens.view(images.shape[0], *stage.grid(images.shape[2], images.shape[3]))


class _Decoder(nn.Module):
    """Tokens int64 (B, rows, columns) -> images (B, C, H, W)."""

    def __init__(self, stage: FirstStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, tokens: Tensor) -> Tensor:
        return self.stage.decode(self.stage.codes_of(tokens))


class _Transformer(nn.Module):
    """Tokens int64 (B, T), the condition's before the image's -> logits (B, T, vocab_size) of those that follow."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens)[0]


@torch.no_grad()
def export(
    model: Model, out: str | os.PathLike[str], format: str = "torch", *, bars: Bars = silent
) -> dict[str, Exported]:
    """Write the networks of a model as programs for torch (``.pt2``) or ONNX (``.onnx``), and check each file.

    A first stage has an ``encoder`` and a ``decoder``, a prior a ``transformer`` too. Batches, sizes of images and
    lengths of sequences may vary. A file is run by ``torch.export.load``, or by onnxruntime, on an input of other sizes
    than those traced, and compared with the model before it gets its name. ``out`` is a directory; it also gets
    `DESCRIPTION`. ``bars`` opens counters of progress.

    Returns what was written by name. Raises UserError for another format, packages that are missing, a first stage of
    two levels, a model too large for ONNX, and a network that cannot be exported or gives other results.
    """
    if format not in FORMATS:
        raise UserError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}{nearest(str(format), FORMATS)}")
    if format == "onnx":
        _check_packages()
    out = Path(out)
    check_directory(out)
    source = unread(model)
    network = source.model.cpu().float().eval()
    networks = _networks(network)
    written = {}
    out.mkdir(parents=True, exist_ok=True)
    with bars("networks", len(networks)) as counter:
        for name, described in networks.items():
            written[name] = _write(described, out / f"{name}{FORMATS[format]}", format)
            counter.update()
    stage = first_stage_of(network)
    facts = {"format": format, "model": type(network).__name__, "factor": stage.factor, "codes": stage.n_embed}
    write_json(out / DESCRIPTION, facts | {"networks": {name: asdict(each) for name, each in written.items()}})
    return written


def _check_packages() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"format: got onnx without {', '.join(missing)}, expected these packages; run "
            f"'pip install {' '.join(_ONNX_PACKAGES)}', or take the format torch"
        )


def _networks(model: nn.Module) -> dict[str, _Network]:
    stage = first_stage_of(model)
    if stage.levels > 1:
        raise UserError(
            f"model: got a {type(stage).__name__}, whose tokens are of two levels, expected a first stage of one "
            "level, whose encoder and decoder can be exported"
        )
    found = {"encoder": _encoder(stage), "decoder": _decoder(stage)}
    condition = getattr(model, "cond_stage_model", None)
    if isinstance(condition, FirstStage) and condition is not stage:
        found["condition_encoder"] = _encoder(condition)
    if (transformer := getattr(model, "transformer", None)) is not None:
        found["transformer"] = _transformer(transformer)
    return found


def _encoder(stage: FirstStage) -> _Network:
    factor = stage.factor
    channels = getattr(getattr(getattr(stage, "encoder", None), "conv_in", None), "in_channels", 3)

    def sample(shape: tuple[int, int, int]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(shape[0], channels, *(factor * side for side in shape[1:]), generator=generator) * 2 - 1

    rows, columns = (factor * Dim(name) if factor > 1 else Dim(name) for name in ("rows", "columns"))
    return _Network(
        _Encoder(stage), f"images float32 (batch, {channels}, {factor}*rows, {factor}*columns) in [-1, 1]",
        f"tokens int64 (batch, rows, columns), 0 to {stage.n_embed - 1}", {0: Dim("batch"), 2: rows, 3: columns},
        sample,
    )  # fmt: skip


def _decoder(stage: FirstStage) -> _Network:
    def sample(shape: tuple[int, int, int]) -> Tensor:
        return torch.randint(0, stage.n_embed, shape, generator=torch.Generator().manual_seed(0))

    return _Network(
        _Decoder(stage), f"tokens int64 (batch, rows, columns), 0 to {stage.n_embed - 1}",
        f"images float32 (batch, channels, {stage.factor}*rows, {stage.factor}*columns), not clipped",
        {0: Dim("batch"), 1: Dim("rows"), 2: Dim("columns")}, sample,
    )  # fmt: skip


def _transformer(transformer: nn.Module) -> _Network:
    config: Any = transformer.config
    longest = config.block_size

    def sample(shape: tuple[int, int, int]) -> Tensor:
        length = min(shape[0] + shape[1] * shape[2], longest)
        return torch.randint(0, config.vocab_size, (shape[0], length), generator=torch.Generator().manual_seed(0))

    return _Network(
        _Transformer(transformer),
        f"tokens int64 (batch, length), the condition's before the image's, length at most {longest}",
        f"logits float32 (batch, length, {config.vocab_size})", {0: Dim("batch"), 1: Dim("length", max=longest)},
        sample,
    )  # fmt: skip


def _write(network: _Network, path: Path, format: str) -> Exported:
    size = sum(weight.numel() * weight.element_size() for weight in network.module.parameters())
    if format == "onnx" and size > _LARGEST_ONNX:
        raise UserError(
            f"format: got onnx for {path.stem} of {size / 1e9:.1f} GB, expected at most {_LARGEST_ONNX / 1e9:.0f} GB, "
            "the most that one file can hold; take the format torch"
        )
    save, run = (_save_onnx, _run_onnx) if format == "onnx" else (_save_torch, _run_torch)
    with _explained(path.stem), _quiet():
        program = _program(network)
    with atomic_write(path) as temporary:
        with _explained(path.stem), _quiet(), reported(path, temporary):
            save(program, temporary)
        sample = network.sample(_CHECKED)
        with _explained(path.stem), _quiet():
            difference = _difference(run(temporary, sample), network.module(sample))
        limit = _OTHER_TOKENS if sample.is_floating_point() else _TOLERANCE
        if not difference <= limit:
            raise UserError(
                f"{path.stem}: got results that differ from the model's by {difference:.2g}, expected at most {limit:g}"
                "; the file is not kept, as this version of torch does not export the network correctly"
            )
    return Exported(path.name, network.input, network.output, difference)


def _program(network: _Network) -> ExportedProgram:
    """The network in operations of torch alone."""
    program = torch.export.export(network.module, (network.sample(_TRACED),), dynamic_shapes=(network.dims,))
    searches = [getattr(torch.ops.tamingfast, name).default for name in ("nearest_code", "native_nearest_code")]
    return program.run_decompositions(dict.fromkeys(searches, _nearest_code))


def _nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """`tamingfast.ops.nearest_code` in operations that every runtime has: argmin_j |c_j|^2 - 2 z c_j, in float64."""
    z, codes = z.double(), codebook.double()
    return (codes.square().sum(1) - 2 * z @ codes.T).argmin(1)


def _save_torch(program: ExportedProgram, path: Path) -> None:
    # In memory first: torch's writer ends the process where a file cannot be written to its end.
    content = io.BytesIO()
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def _run_torch(path: Path, sample: Tensor) -> Tensor:
    with open(path, "rb") as stream:
        result: Tensor = torch.export.load(stream).module()(sample)
    return result


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    made: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    made.save(path, external_data=False)


def _run_onnx(path: Path, sample: Tensor) -> Tensor:
    import onnxruntime  # optional package

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: sample.numpy()})
    return torch.from_numpy(result)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The share of tokens that differ; of other values the largest difference, relative to the largest value."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float((found != expected).float().mean())
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of the exporters about their own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """The errors of torch's exporters, which share no class, in words."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        kinds = {kind.__module__.partition(".")[0] + "." + kind.__name__ for kind in type(error).__mro__}
        exporters = {"torch.OnnxExporterError", "torch.UserError", "torch.Unsupported", "torch.ConversionError"}
        if kinds & exporters or "data-dependent" in str(error):
            raise UserError(
                f"{name}: got a network that torch cannot export ({' '.join(str(error).split())[:200]}), expected one "
                "of torch's own operations; export one of this package's classes"
            ) from error
        raise
