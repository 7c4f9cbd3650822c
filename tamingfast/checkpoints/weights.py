"""State dicts on disk: read without running code, loaded into modules, written as safetensors."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tamingfast.checkpoints import msgpack
from tamingfast.checkpoints.file_kinds import INDEX, MSGPACK, SAFETENSORS, TORCH, kind_of
from tamingfast.checkpoints.seal import UNSEALED, check_seal, seal
from tamingfast.checkpoints.torch_files import BadFile, TorchFile, open_torch_file
from tamingfast.checkpoints.unpickling import Foreign, StoredTensor, Unusable
from tamingfast.errors import UserError, first_line
from tamingfast.files import atomic_write, open_regular
from tamingfast.progress import bar

logger = logging.getLogger(__name__)

#: Prefixes of keys in training checkpoints that do not belong to a model; such keys are dropped on loading.
TRAINING_ONLY = (
    "loss.perceptual_loss.", "first_stage_model.loss.", "cond_stage_model.loss.", "model_ema.",
    "n_averaged",  # of torch.optim.swa_utils.AveragedModel
)  # fmt: skip
# Wrappers of torch around a module or a part of it, as they appear in keys.
_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEEPEST = 8  # parts of a shared prefix that are looked at
# Where checkpoints keep the weights; without any of these the whole content is meant.
_STATES = ("state_dict", "model", "model_state_dict", "module")
# By this name the averages of a LlamaGen training are recognised, which count there: its evaluation takes them.
_LLAMAGEN = "encoder.conv_blocks.0.res.0.conv1.weight"
_LARGEST_INDEX = 64 << 20
#: What to do about weights that do not fit.
ADVICE = "use the config that the checkpoint was trained with"
# Tied and expanded tensors are stored once, so weights may take this many times the size of their file.
_SHARED = 16


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        path: of the file.
        state: its tensors on the CPU by name.
        beside: what lies beside them, as `Unpickler.load` gives it: to be described, never to be used.
        metadata: of a safetensors file.
    """

    path: Path
    state: dict[str, Tensor]
    beside: Mapping[Any, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def number(self, *names: str) -> int | None:
        """The first of these counts, such as "global_step", that the file records; None if it records none."""
        progress = self.beside.get("progress")
        # Lightning's checkpoints, our state.pt and our weights.safetensors record a training's progress in three ways.
        records = (self.beside, progress if isinstance(progress, Mapping) else {}, self.metadata)
        found = (_count(record.get(name)) for record in records for name in names)
        return next((count for count in found if count is not None), None)


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        value = int(value)
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a safetensors file, an original Lightning ``.ckpt`` or a plain torch file, on the CPU.

    The content of the file, not its name, decides how it is read, and nothing that it names is looked up or called.
    Raises UserError for a file that is missing, damaged or not a checkpoint, or holds anything but dense real numbers.
    """
    state = read_checkpoint(path).state
    check_real(state, path)
    return state


def check_real(state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """UserError naming the first tensor of ``state`` that has complex numbers: copying would drop imaginary parts."""
    for key, value in state.items():
        if value.is_complex():
            raise UserError(f"{source}: got complex numbers in {shown(key)}, expected real weights")


def read_checkpoint(path: str | os.PathLike, tensors: bool = True, prefix: str = "") -> Checkpoint:
    """The content of a checkpoint file; accepts and raises what `read_state_dict` does, but allows complex numbers.

    Without ``tensors`` only what lies beside them is read, which is fast. With a ``prefix`` only tensors whose names
    begin with it are, if there are any.
    """
    path = Path(path)
    with opened(path) as (kind, stream):
        if kind == SAFETENSORS:
            metadata = _metadata(path)
            return Checkpoint(path, _read_safetensors(path, prefix) if tensors else {}, metadata=metadata)
        if kind == INDEX:
            return Checkpoint(path, _read_parts(path, stream, prefix) if tensors else {})
        if kind == MSGPACK:
            try:
                return Checkpoint(path, msgpack.tensors(stream_content(stream)) if tensors else {})
            except msgpack.BadMsgpack as error:
                raise _no_checkpoint(path, str(error)) from error
        if kind != TORCH:
            raise _no_checkpoint(path, kind)
        try:
            file = open_torch_file(stream)
            beside = file.content if isinstance(file.content, Mapping) else {}
            return Checkpoint(path, _state_of(file, path, prefix) if tensors else {}, beside)
        except BadFile as error:
            raise _no_checkpoint(path, str(error)) from error


def _no_checkpoint(path: Path, found: str) -> UserError:
    return UserError(f"{path}: got {found}, expected a checkpoint; copy or download it again, or give another file")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The kind (`kind_of`) and the bytes of a checkpoint. UserError if the file is missing, empty or cannot be read."""
    try:
        with open_regular(path) as stream:
            if not os.fstat(stream.fileno()).st_size:
                raise _no_checkpoint(path, "an empty file (0 bytes)")
            yield kind_of(stream), stream
    except UserError:
        raise
    except FileNotFoundError:
        found = f"a link to {shown(os.readlink(path))}, which is missing" if path.is_symlink() else "no file"
        raise UserError(f"{path}: got {found}, expected a checkpoint; give the path of an existing one") from None
    except (OSError, ValueError) as error:  # a ValueError for a path that no system call takes
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: got '{reason}', expected a checkpoint that can be read") from error


def metadata_of(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, empty for other files. UserError for one that cannot be read."""
    with opened(Path(path)) as (kind, _):
        return _metadata(path) if kind == SAFETENSORS else {}


def _metadata(path: str | os.PathLike) -> dict[str, str]:
    with _safetensors(path), safe_open(path, framework="pt") as stream:
        return stream.metadata() or {}


def _read_safetensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    check_seal(path)
    with _safetensors(path):
        if not prefix:
            return load_file(path)
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            wanted = [name for name in names if name.startswith(prefix)] or names
            return {name: stream.get_tensor(name) for name in wanted}


def stream_content(stream: IO[bytes]) -> bytes:
    """All bytes of a file."""
    stream.seek(0)
    return stream.read()


def _read_parts(path: Path, stream: IO[bytes], prefix: str) -> dict[str, Tensor]:
    """The tensors of the files beside an index, which says in which of them each is."""
    places = _places(path, stream)
    wanted = {name: file for name, file in places.items() if name.startswith(prefix)} or places
    state: dict[str, Tensor] = {}
    for file in sorted(set(wanted.values())):
        found = read_checkpoint(path.parent / file, prefix=prefix).state
        state |= {name: value for name, value in found.items() if wanted.get(name) == file}
    missing = next((name for name in wanted if name not in state), None)
    if missing is not None:
        raise UserError(
            f"{path.parent / wanted[missing]}: got no {shown(missing)}, expected it there, as '{path.name}' says; copy "
            "or download the files again"
        )
    return state


def _places(path: Path, stream: IO[bytes]) -> dict[str, str]:
    """Name of a tensor -> name of its file, as an index says; UserError for anything else, such as other folders."""
    size = os.fstat(stream.fileno()).st_size
    try:
        content = json.loads(stream_content(stream)) if size <= _LARGEST_INDEX else None
    except (ValueError, RecursionError):
        content = None
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    names = list(places.values()) if isinstance(places, Mapping) else []
    if (
        not isinstance(places, Mapping)
        or not names
        or not all(isinstance(name, str) and name == Path(name).name and "\0" not in name for name in names)
    ):
        raise _no_checkpoint(path, f"a JSON text of {size} bytes that lists no files of weights beside it")
    if path.name in names:
        raise _no_checkpoint(path, "an index that lists itself")
    return dict(places)


@contextlib.contextmanager
def _safetensors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # the library raises errors of several types for damaged files and unknown dtypes
        reason = "".join(filter(str.isprintable, first_line(error)))[:150]  # it quotes keys of the file
        raise UserError(
            f"{path}: got a damaged safetensors file ({reason}), expected weights; copy or download it again"
        ) from error


def _state_of(file: TorchFile, path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in the ``state_dict`` of a checkpoint, in the ``model`` of our ``state.pt``, or in the mapping."""
    content = file.content
    places = [content["ema"]] if isinstance(content, Mapping) and _LLAMAGEN in _named(content.get("ema")) else []
    places += [content.get(name) for name in _STATES if name in content] if isinstance(content, Mapping) else []
    named = next((place for place in places if _tensors(place)), None) or _only_state(content, path)
    if named is None:
        raise UserError(
            f"{path}: got no weights but {_described((*places, content)[0])}, expected a checkpoint with a "
            "'state_dict' of tensors; save that of the model"
        )
    for key, value in named.items():
        if isinstance(value, Unusable):
            raise UserError(f"{path}: got {value.kind} as {shown(key)}, expected dense tensors; save it as one")
    stored = {key: value for key, value in named.items() if isinstance(key, str) and isinstance(value, StoredTensor)}
    stored = {key: value for key, value in stored.items() if key.startswith(prefix)} or stored
    size = path.stat().st_size
    asked = sum(value.dtype.itemsize * math.prod(value.shape) for value in stored.values())
    if asked > _SHARED * size:
        raise UserError(
            f"{path}: got tensors of {asked} bytes in a file of {size}, expected at most {_SHARED} times it"
        )
    state = {}
    with bar(" tensors", len(stored), desc="reading weights", delay=1, leave=False) as progress:
        for key, value in stored.items():
            state[key] = file.tensor(value)
            progress.update()
    return state


def _named(value: Any) -> Collection[str]:
    """The names in a mapping of a file, without what wrappers have put into them; none of anything else."""
    return {_without_wrappers(str(key)) for key in value} if isinstance(value, Mapping) else ()


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _only_state(content: Any, path: Path) -> Mapping[Any, Any] | None:
    """The one mapping of tensors at most two levels down in ``content``; UserError if there are several.

    It is ``content`` itself if that has as many tensors: beside other weights, single ones are counts, such as "step".
    """
    level: list[tuple[str, Any]] = [("", content)]
    states: dict[str, Mapping[Any, Any]] = {}
    for _ in range(2):
        level = [
            (f"{name}.{key}" if name else str(key), inside)
            for name, value in level
            if isinstance(value, Mapping) and not isinstance(value, Foreign)
            for key, inside in value.items()
        ]
        states |= {name: value for name, value in level if _tensors(value)}
    if _tensors(content) >= max(map(_tensors, states.values()), default=1):
        return content
    if len(states) > 1:
        some = ", ".join(shown(name) for name in list(states)[:4])
        raise UserError(
            f"{path}: got several networks or copies of one ({some}), expected one; save that of the model as "
            "'state_dict'"
        )
    return next(iter(states.values()), None)


def _tensors(value: Any) -> int:
    """How many tensors with a name a value holds."""
    pairs = value.items() if isinstance(value, Mapping) else ()
    return sum(isinstance(key, str) and isinstance(entry, StoredTensor | Unusable) for key, entry in pairs)


def _described(value: Any) -> str:
    """What a value without tensors is, in a few words."""
    if isinstance(value, Foreign):
        return f"a pickled object of '{value.name}', whose class is not run"
    if isinstance(value, Mapping):
        objects = (entry.name for entry in value.values() if isinstance(entry, Foreign))
        keys = (shown(key) for key in value)
        found = next(
            (f" with an object of '{name}'" for name in objects), next((f" such as {key}" for key in keys), "")
        )
        return f"a mapping of {len(value)} entries{found}"
    return f"a value of the type {type(value).__name__}"


def shown(key: object) -> str:
    """A key of a file as messages show it: quoted, on one line and not too long."""
    text = repr(key[:100]) if isinstance(key, str) else repr(key)
    return text if not isinstance(key, str) or len(key) <= 100 else f"{text[:-1]}...'"


def check_finite(state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """UserError naming the first tensor of ``state`` that contains NaN or infinity."""
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        finite = torch.isfinite(value.float() if value.dtype.itemsize == 1 else value)
        if not finite.all():
            raise UserError(
                f"{source}: got {int((~finite).sum())} non-finite values of {value.numel()} in {shown(key)}, expected "
                "finite weights; take a checkpoint from before the training diverged"
            )


def unwrapped(state: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """``state`` without what wrappers have put into its keys, such as "module." of DistributedDataParallel.

    The names of torch's wrappers go wherever they are. Of a prefix that all keys share, the part goes without which
    most keys are in ``known``, those of the model.
    """
    names = [_without_wrappers(key) for key in state]
    if len(set(names)) < len(state):
        names = list(state)
    models = [name.split(".")[:-1] for name in names if not name.startswith(("loss.", *TRAINING_ONLY))]
    levels = itertools.islice(zip(*models, strict=False), _DEEPEST)
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)]
    prefixes = ["".join(f"{part}." for part in shared[:depth]) for depth in range(len(shared) + 1)]
    prefix = max(prefixes, key=lambda prefix: sum(name.removeprefix(prefix) in known for name in names))
    return {name.removeprefix(prefix): value for name, value in zip(names, state.values(), strict=True)}


def prefixed(state: Mapping[str, Tensor], key: str) -> str:
    """The first keys of ``state`` that are ``key`` behind a prefix, as messages name them; empty if there are none."""
    return " and ".join(itertools.islice((shown(found) for found in state if found.endswith(f".{key}")), 3))


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    *,
    optional: Iterable[str] = (),
    advice: str = ADVICE,
) -> None:
    """Copy ``state`` into ``module``; UserError naming the first key that does not fit, or is not finite.

    A wrapper's prefix is taken off (`unwrapped`). ``optional`` lists prefixes of keys that may be missing or left over;
    ``advice`` says what to do about others.
    """
    optional = (*TRAINING_ONLY, *optional)
    own = module.state_dict()
    state = {key: value for key, value in unwrapped(state, own).items() if not key.startswith(TRAINING_ONLY)}
    for key in state.keys() & own.keys():
        _check_fit(key, state[key], own[key], source)
    check_finite(state, source)
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except (RuntimeError, UserError) as error:  # what hooks of modules say of values that cannot be
        reason = " ".join(str(error).split("\n\t")[-1].split())
        raise UserError(f"{source}: got weights that do not fit ({reason}), expected those of the model") from error
    missing = [key for key in missing if not key.startswith(optional)]
    unexpected = [key for key in unexpected if not key.startswith(optional)]
    if missing or unexpected:
        first = f"no {shown(missing[0])}" if missing else f"{shown(unexpected[0])}, which the model lacks"
        if missing and (elsewhere := prefixed(state, missing[0])):
            first, advice = f"{first} but {elsewhere}", "save the weights under that prefix alone, without it"
        raise UserError(
            f"{source}: got {first} ({len(missing)} keys missing, {len(unexpected)} left over), expected the keys of "
            f"the model; {advice}"
        )


def _check_fit(key: str, value: Tensor, own: Tensor, source: str | os.PathLike) -> None:
    if own.shape != value.shape:
        raise UserError(
            f"{source}: got shape {tuple(value.shape)} for {shown(key)}, expected {tuple(own.shape)}; {ADVICE}"
        )
    if own.is_floating_point() and not value.is_floating_point():
        raise UserError(
            f"{source}: got {str(value.dtype).removeprefix('torch.')} numbers in {shown(key)}, expected real ones with "
            "a fraction; save the weights as floating-point numbers"
        )


def folded(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state``, the weights of ``module``, as exported: its quantisers leave codebooks of what only training needs."""
    state = dict(state)
    for name, part in module.named_modules(remove_duplicate=False):  # a stage may be two parts of a prior
        if hasattr(part, "folds_to_plain"):  # `tamingfast.models.quantize.Quantizer`
            part.fold(state, f"{name}." if name else "")
    return state


def save_weights(path: str | os.PathLike, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] = {}) -> None:
    """Write tensors as safetensors, atomically, with a checksum (`tamingfast.checkpoints.seal`).

    Attention masks are left out, because ``n_unmasked`` in the config says the same.
    """
    tensors = {key: value.contiguous() for key, value in state_dict.items() if not key.endswith(".attn.mask")}
    # Safetensors refuses tensors that share memory, such as those of a condition stage that is the first stage itself.
    seen: set[int] = set()
    for key, value in tensors.items():
        if value.data_ptr() in seen and value.numel():
            tensors[key] = value.clone()
        seen.add(value.data_ptr())
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={**metadata, **UNSEALED})
        seal(temporary)
