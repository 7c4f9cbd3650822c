"""Data sets by name, and their batches: ``build`` makes the training and validation sets, ``loader`` reads one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from tamingfast.checkpoints.config import instantiate_from_config
from tamingfast.checkpoints.values import check_types
from tamingfast.data import cifar10, conditioned, folders, photos, shards, tokens
from tamingfast.data.base import EpochDataset, as_epoch_dataset
from tamingfast.data.checks import whole
from tamingfast.data.conditions import SETTINGS
from tamingfast.data.crops import cut
from tamingfast.data.index import Index, using
from tamingfast.data.loading import Loader, loader
from tamingfast.data.randomness import shuffled
from tamingfast.errors import UnknownKey, UserError, brief, nearest

__all__ = ["Index", "Loader", "build", "loader", "shuffled"]

#: Data sets of images without conditions, from which squares can be cropped.
_IMAGES: dict[str, Callable[..., tuple[EpochDataset, EpochDataset]]] = {
    "cifar10": cifar10.build,
    "folder": folders.build,
    "photos": photos.build,
}
_OTHERS: dict[str, Callable[..., tuple[EpochDataset, EpochDataset | None]]] = {
    "conditions": conditioned.build,
    "shards": shards.build,
    "tokens": tokens.build,
}
_FACTORIES = _IMAGES | _OTHERS
#: What is meant by a path, unless another data set is named.
_USUAL = "folder"
#: Data sets whose images can have any size.
ANY_SIZE = ("photos", "folder", "shards", "conditions")
#: Keys of the two data sets in the original's layout.
SPLITS = ("train", "validation")
#: Settings that runs on token files keep from the images that were encoded.
_OF_ENCODED_IMAGES = ("size", "seed", "kind", *SETTINGS)


def build(config: Mapping[str, Any], index: Index | None = None) -> tuple[EpochDataset, EpochDataset | None]:
    """The (training, validation) data sets that the ``data:`` section of a config describes.

    ``config["name"]`` is ``photos``, ``cifar10``, ``folder``, ``shards``, ``conditions`` or ``tokens``; ``crop`` is the
    side of squares to cut from images without conditions (see `tamingfast.data.crops`); every other key is an argument
    of that module's ``build``. Without a name, ``train`` and ``validation`` are data sets as the original's configs
    describe them, {target, params}. Items are a pure function of (seed, epoch, index), where ``set_epoch`` gives the
    epoch; see `tamingfast.data.base.EpochDataset`. Validation is None for token files and original configs without one.
    What ``index`` has of an earlier listing of the same files is not listed again.

    Raises UserError for an unknown name or key (naming the nearest valid one), for a missing key, and for whatever is
    wrong with the data themselves.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"data: got {brief(config)}, expected a mapping of settings, such as name=photos")
    with using(index):
        return _built(config)


def _built(config: Mapping[str, Any]) -> tuple[EpochDataset, EpochDataset | None]:
    originals = {split: config[split] for split in SPLITS if split in config}
    name = config.get("name")
    if name is None:
        return _originals(originals)
    check_name(name)
    check_keys(config)
    options = _options(config)
    _check_given(name, options)
    check_types(options, _FACTORIES[name], "data")
    crop, seed = config.get("crop"), whole("seed", config.get("seed", 0))
    if crop is None:
        return _FACTORIES[name](**options)
    if name not in _IMAGES:
        raise UserError(
            f"data.crop: got {crop} for data.name={name}, expected images without conditions; leave it out, and give "
            "short_side and size to crop images with their conditions"
        )
    return cut(_IMAGES[name](**options), crop, seed)


def check_name(name: object) -> None:
    """Raise UserError unless there is a data set of this name."""
    if not isinstance(name, str) or name not in _FACTORIES:
        raise UserError(f"data.name: got {brief(name)}, expected one of {_names()}{nearest(str(name), _FACTORIES)}")


def keys(name: object) -> list[str]:
    """The keys that the ``data:`` section of this data set may have; of all data sets if there is none of this name."""
    names = [name] if isinstance(name, str) and name in _FACTORIES else list(_FACTORIES)
    return ["name", *dict.fromkeys(key for each in names for key in _parameters(each)), "crop"]


def check_keys(config: Mapping[str, Any]) -> None:
    """Raise UserError for a key of a ``data:`` section that the data set of its name does not have."""
    name = config["name"]
    for key in _options(config):
        if key in _parameters(name):
            continue
        owners = sorted((each for each in _FACTORIES if key in _parameters(each)), key=lambda each: each != _USUAL)
        if owners:
            raise UserError(
                f"data.{key}: got a key that data.name={name} does not have, expected it with "
                f"data.name={' or '.join(owners)}; add data.name={owners[0]}, or leave it out"
            )
        valid = sorted(keys(name)[1:])
        sentence = f"data.{key}: got a key that data.name={name} does not have, expected one of {', '.join(valid)}"
        raise UnknownKey(f"data.{key}", sentence, [f"data.{each}" for each in valid])


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_FACTORIES[name]).parameters


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a data set's ``build``."""
    others = ("name", "crop", *SPLITS, *(_OF_ENCODED_IMAGES if config["name"] == "tokens" else ()))
    return {key: value for key, value in config.items() if key not in others}


def _check_given(name: str, options: Mapping[str, Any]) -> None:
    for key, parameter in _parameters(name).items():
        if parameter.default is parameter.empty and options.get(key) is None:
            raise UserError(f"data.{key}: got none, expected a value for data.name={name}; add data.{key}=...")


def _originals(described: Mapping[str, Any]) -> tuple[EpochDataset, EpochDataset | None]:
    """Data sets from {target, params}; validation may be missing."""
    if not described.get("train"):
        raise UserError(
            f"data.name: got none, expected one of {_names()}; give data.name=photos, or data.name=folder "
            "data.path=DIRECTORY"
        )
    try:
        train, validation = (_made(described.get(split), split) for split in SPLITS)
    except UserError as error:
        problem, _, advice = str(error).partition("; ")
        folder = "give data.name=folder data.path=DIRECTORY to train on a directory"
        own = f"{advice}, or " if advice and "data.name=" not in advice else ""
        raise UserError(f"{problem}; {advice if 'data.name=' in advice else own + folder}") from error
    assert train is not None
    return train, validation


def _made(described: Mapping[str, Any] | None, split: str) -> EpochDataset | None:
    if not described:
        return None
    made = instantiate_from_config(described)
    if not isinstance(made, Dataset) or type(made).__getitem__ is Dataset.__getitem__ or not _has_length(made):
        raise UserError(f"data.{split}.target: got {described['target']}, expected a data set with items and a length")
    return as_epoch_dataset(made)


def _has_length(dataset: Any) -> bool:
    try:
        return len(dataset) >= 0
    except Exception:  # a class of anybody's, such as torch's TensorDataset of no tensors
        return False


def _names() -> str:
    return ", ".join(sorted(_FACTORIES))
