"""State dicts on disk: reading them without trusting them, and putting them into modules with clear errors."""

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

import torch
from torch import Tensor, nn

from tamingfast.errors import UserError

logger = logging.getLogger(__name__)

#: Keys that a training checkpoint carries beside the model: they are dropped when a model is loaded.
TRAINING_ONLY = ("loss.perceptual_loss.", "first_stage_model.loss.", "cond_stage_model.loss.", "model_ema.")

# What old Lightning pickles mention beside tensors. The names are mapped to inert stand-ins: nothing of
# Lightning or omegaconf is imported or run while a checkpoint is read.
_LIGHTNING_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "main.ImageLogger",
    "main.SetupCallback",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "typing.Any",
)
# Subclasses of dict; the reader fills only true dicts with items.
_LIGHTNING_DICTS = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)


class _Inert:
    """Stands for an object of a checkpoint that we do not need; accepts whatever state the pickle gives it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _allowed_globals() -> list[Any]:
    import numpy as np

    names = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in _LIGHTNING_NAMES]
    names += [(collections.OrderedDict, name) for name in _LIGHTNING_DICTS]
    # Scalars such as a monitored best score are pickled through numpy, under its old and its new module name.
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "b1")}
    return [
        *names,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *dtypes,
        collections.OrderedDict,
        collections.defaultdict,
    ]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, an original Lightning ``.ckpt`` or a plain torch file, on the CPU.

    Nothing but tensors, containers and a short list of inert Lightning names is unpickled. Raises UserError,
    in one sentence, for a file that is missing, truncated, not a checkpoint, or that wants more.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
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
        with torch.serialization.safe_globals(_allowed_globals()):
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


def init_from_ckpt(module: nn.Module, path: str | os.PathLike, ignore_keys: Iterable[str] = ()) -> None:
    """The original's ``init_from_ckpt``: without keys that start with any of ``ignore_keys``; others may be missing."""
    ignore_keys = tuple(ignore_keys)
    state = read_state_dict(path)
    state = {key: value for key, value in state.items() if not (ignore_keys and key.startswith(ignore_keys))}
    load_into(module, state, path, strict=False)
    logger.info("restored from %s", path)
