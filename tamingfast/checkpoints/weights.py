"""State dicts on disk: read without running code, loaded into modules, written as safetensors."""

from __future__ import annotations

import collections
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tamingfast.errors import UserError
from tamingfast.files import atomic_write

logger = logging.getLogger(__name__)

#: Prefixes of keys in training checkpoints that do not belong to a model; such keys are dropped on loading.
TRAINING_ONLY = ("loss.perceptual_loss.", "first_stage_model.loss.", "cond_stage_model.loss.", "model_ema.")

# Besides tensors, Lightning's pickles contain callbacks, hyper-parameters and configs. All names below these are mapped
# to inert stand-ins, so reading a checkpoint imports and runs nothing of these packages.
_INERT_FAMILIES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "main.", "taming.")
_INERT_NAMES = ("argparse.Namespace", "pathlib.PosixPath", "pathlib.Path", "typing.Any")
# Subclasses of dict; torch's reader fills only exact dicts with items.
_DICT_NAMES = ("AttributeDict",)
_HARMLESS = (dict, list, tuple, set, frozenset, int, float, complex, bool, str, bytes)


class _Inert:
    """Stand-in for an object of a checkpoint that is not needed; accepts any state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _allowed_globals(path: Path) -> list[Any]:
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file or the format before torch 1.6, which torch.load reports or reads
        wanted = []
    names = []
    for name in wanted:
        leaf = name.rpartition(".")[2]
        if name.startswith(_INERT_FAMILIES) or name in _INERT_NAMES:
            names.append((collections.OrderedDict if leaf in _DICT_NAMES else type(leaf, (_Inert,), {}), name))
    # Scalars and arrays are pickled by functions of numpy, under the old or the new name of their module.
    rebuild = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    names += [(rebuild[leaf], f"numpy.{core}.multiarray.{leaf}") for leaf in rebuild for core in ("core", "_core")]
    dtypes = {type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "u1", "b1", "U1", "O")}
    return [*names, np.dtype, np.ndarray, *dtypes, *_HARMLESS, collections.OrderedDict, collections.defaultdict]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, an original Lightning ``.ckpt`` or a plain torch file, on the CPU.

    Only tensors, containers and inert stand-ins are unpickled. Raises UserError for a file that is missing, truncated
    or not a checkpoint, or that contains other objects.
    """
    return state_dict_of(read_checkpoint(path), path)


def state_dict_of(content: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors in the ``state_dict`` of a checkpoint, in the ``model`` of our ``state.pt``, or in the mapping."""
    state = content.get("state_dict", content.get("model", content))
    items = state.items() if isinstance(state, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: got no weights, expected a checkpoint with a 'state_dict' of tensors")
    return tensors


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The whole content of a checkpoint file; accepts and raises what `read_state_dict` does."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: got no file, expected a checkpoint; give the path of an existing one")
    if path.is_dir():
        raise UserError(f"{path}: got a directory, expected a checkpoint file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: got an empty file (0 bytes), expected a checkpoint; copy or download it again")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, size)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: got a {type(content).__name__}, expected a mapping of names to tensors")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: got a damaged file ({error}), expected safetensors; copy or download it again"
        ) from error


def _read_pickle(path: Path, size: int) -> Any:
    try:
        with torch.serialization.safe_globals(_allowed_globals(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if wanted:
            raise UserError(
                f"{path}: got a pickle that runs '{wanted[1]}', expected tensors only, as code in checkpoints is "
                "refused; save its 'state_dict' alone and load that"
            ) from error
        raise _unreadable(path, size) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # What torch's readers raise for bytes that end early or were never a checkpoint.
        raise _unreadable(path, size) from error


def _unreadable(path: Path, size: int) -> UserError:
    return UserError(f"{path}: got {_problem(path, size)}, expected a checkpoint; copy or download it again")


def _problem(path: Path, size: int) -> str:
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"a zip archive whose end is missing after {size} bytes, as after an interrupted download"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"a web page of {size} bytes"
    return f"{size} bytes that are not in torch's format or end too early"


def check_finite(state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """UserError naming the first tensor of ``state`` that contains NaN or infinity."""
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise UserError(
                f"{source}: got {count} non-finite values of {value.numel()} in '{key}', expected finite weights; take "
                "a checkpoint from before the training diverged"
            )


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    *,
    strict: bool = True,
    optional: Iterable[str] = (),
) -> None:
    """Copy ``state`` into ``module``; UserError naming the first key that does not fit, or is not finite.

    ``optional`` lists prefixes of keys that may be missing or left over; with ``strict=False`` any key may, as in the
    original, and their number is logged.
    """
    optional = (*TRAINING_ONLY, *optional)
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
    check_finite(state, source)
    own = module.state_dict()
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            raise UserError(
                f"{source}: got shape {tuple(value.shape)} for '{key}', expected {tuple(own[key].shape)}; use the "
                "config that the checkpoint was trained with"
            )
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith(optional)]
    unexpected = [key for key in unexpected if not key.startswith(optional)]
    if strict and (missing or unexpected):
        first = f"no '{missing[0]}'" if missing else f"'{unexpected[0]}', which the model lacks"
        raise UserError(
            f"{source}: got {first} ({len(missing)} keys missing, {len(unexpected)} left over), expected the keys of "
            "the model; use the config that the checkpoint was trained with"
        )
    if missing or unexpected:
        logger.warning("%s: %d keys missing, %d left over", source, len(missing), len(unexpected))


def init_from_ckpt(module: nn.Module, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
    """The original's ``init_from_ckpt``: a non-strict load, without keys that start with any of ``ignore_keys``."""
    ignore_keys = tuple(ignore_keys)
    state = read_state_dict(path)
    state = {key: value for key, value in state.items() if not (ignore_keys and key.startswith(ignore_keys))}
    load_into(module, state, path, strict=False)
    logger.info("restored from %s", path)


def save_weights(path: str | os.PathLike, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] = {}) -> None:
    """Write tensors as safetensors, atomically.

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
        save_file(tensors, temporary, metadata=dict(metadata))
