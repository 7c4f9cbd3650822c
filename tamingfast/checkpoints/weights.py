"""State dicts on disk: reading them without trusting them, and putting them into modules with clear errors."""

from __future__ import annotations

import collections
import hashlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tamingfast.errors import UserError

logger = logging.getLogger(__name__)

#: Keys that a training checkpoint carries beside the model: they are dropped when a model is loaded.
TRAINING_ONLY = ("loss.perceptual_loss.", "first_stage_model.loss.", "cond_stage_model.loss.", "model_ema.")

# What Lightning's pickles mention beside tensors: callbacks, hyper-parameters, configs. Every name below these is
# mapped to an inert stand-in, so nothing of these packages is imported or run while a checkpoint is read.
_INERT_FAMILIES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "main.", "taming.")
_INERT_NAMES = ("argparse.Namespace", "pathlib.PosixPath", "pathlib.Path", "typing.Any")
# Subclasses of dict; the reader fills only true dicts with items.
_DICT_NAMES = ("AttributeDict",)
_HARMLESS = (dict, list, tuple, set, frozenset, int, float, complex, bool, str, bytes)


class _Inert:
    """Stands for an object of a checkpoint that we do not need; accepts whatever state the pickle gives it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _allowed_globals(path: Path) -> list[Any]:
    import numpy as np

    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file or the format before torch 1.6: what is wrong with it shows when it is read
        wanted = []
    names = []
    for name in wanted:
        leaf = name.rpartition(".")[2]
        if name.startswith(_INERT_FAMILIES) or name in _INERT_NAMES:
            names.append((collections.OrderedDict if leaf in _DICT_NAMES else type(leaf, (_Inert,), {}), name))
    # Scalars and arrays are pickled through numpy, under its old and its new module name.
    rebuild = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(0).__reduce__()[0]}
    names += [(rebuild[leaf], f"numpy.{core}.multiarray.{leaf}") for leaf in rebuild for core in ("core", "_core")]
    dtypes = {type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "u1", "b1", "U1", "O")}
    return [*names, np.dtype, np.ndarray, *dtypes, *_HARMLESS, collections.OrderedDict, collections.defaultdict]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, an original Lightning ``.ckpt`` or a plain torch file, on the CPU.

    Nothing but tensors, containers and a short list of inert Lightning names is unpickled. Raises UserError,
    in one sentence, for a file that is missing, truncated, not a checkpoint, or that wants more.
    """
    return state_dict_of(read_checkpoint(path), path)


def state_dict_of(content: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ``state_dict``, of our ``state.pt``'s ``model``, or of the mapping itself."""
    state = content.get("state_dict", content.get("model", content))
    items = state.items() if isinstance(state, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights; expected a checkpoint with a 'state_dict' of tensors")
    return tensors


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The whole mapping that a checkpoint file holds; see `read_state_dict` for what is accepted."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}; give the path of an existing file")
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the path of a checkpoint file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes); copy or download the checkpoint again")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, size)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a mapping of names to tensors")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy or download the file again") from error


def _read_pickle(path: Path, size: int) -> Any:
    try:
        with torch.serialization.safe_globals(_allowed_globals(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if wanted:
            raise UserError(
                f"{path} is refused: beside tensors it wants to run '{wanted[1]}', and a checkpoint must not run "
                "code; save its 'state_dict' alone and load that"
            ) from error
        raise UserError(f"{path} is no checkpoint or a damaged one ({_problem(path, size)})") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        # The many ways in which torch's readers meet bytes that end early or were never a checkpoint.
        raise UserError(f"{path} is no checkpoint or a damaged one ({_problem(path, size)})") from error


def _problem(path: Path, size: int) -> str:
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"its {size} bytes begin as a zip archive but the archive's end is missing, as after a broken download"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"its {size} bytes are a web page"
    return f"its {size} bytes are not in torch's format or end too early"


def check_finite(state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """UserError naming the first tensor of ``state`` that holds NaN or infinities."""
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise UserError(
                f"{source} holds {count} non-finite values of {value.numel()} in '{key}'; "
                "take a checkpoint from before the training diverged"
            )


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | os.PathLike,
    *,
    strict: bool = True,
    optional: Iterable[str] = (),
) -> None:
    """Copy ``state`` into ``module``; names and shapes must fit.

    ``optional`` lists prefixes of keys that may be missing or left over. With ``strict=False`` any key may be,
    which is logged, as the original does. Raises UserError that names the first key that does not fit.
    """
    optional = (*TRAINING_ONLY, *optional)
    state = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
    check_finite(state, source)
    own = module.state_dict()
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            raise UserError(
                f"{source} does not fit the model: '{key}' has shape {tuple(value.shape)}, the model expects "
                f"{tuple(own[key].shape)}; use the config that the checkpoint was trained with"
            )
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith(optional)]
    unexpected = [key for key in unexpected if not key.startswith(optional)]
    if strict and (missing or unexpected):
        what = f"lacks '{missing[0]}'" if missing else f"has '{unexpected[0]}', which the model does not know"
        raise UserError(
            f"{source} does not fit the model: it {what} ({len(missing)} keys missing, {len(unexpected)} left over); "
            "use the config that the checkpoint was trained with"
        )
    if missing or unexpected:
        logger.warning("%s: %d keys missing, %d left over", source, len(missing), len(unexpected))


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """A short digest of a model's weights, losses aside: equal for equal models, whatever file they come from."""
    digest = hashlib.sha256()
    for key, value in sorted((model.state_dict() if isinstance(model, nn.Module) else model).items()):
        # Colours for drawing label maps are random and change nothing.
        if not key.startswith(("loss.", "colorize")):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def init_from_ckpt(module: nn.Module, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
    """The original's ``init_from_ckpt``: without keys that start with any of ``ignore_keys``; others may be missing."""
    ignore_keys = tuple(ignore_keys)
    state = read_state_dict(path)
    state = {key: value for key, value in state.items() if not (ignore_keys and key.startswith(ignore_keys))}
    load_into(module, state, path, strict=False)
    logger.info("restored from %s", path)
