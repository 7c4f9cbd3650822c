"""The original's dotted names and their counterparts here.

Configs contain ``target: taming.models.vqgan.VQModel``, and third-party code imports such names. `resolve` finds our
class for such a name, `install` makes the imports work.
"""

from __future__ import annotations

import dis
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar, overload

from tamingfast.renamed import new_name

_MODELS = "tamingfast.models"
_CONFIG = "tamingfast.checkpoints.config"
_LISTS = "tamingfast.data.image_lists"
_SETS = "tamingfast.data.originals"
_OBJECTS = "tamingfast.data.annotated_objects"

#: The packages whose imports `install` serves.
SERVED = ("taming.", "ldm.")

#: original module -> {original name: "our.module:name"}
NAMES: dict[str, dict[str, str]] = {
    "taming.models.vqgan": {
        name: f"{_MODELS}.vqgan:{name}"
        for name in ("VQModel", "VQSegmentationModel", "VQNoDiscModel", "GumbelVQ", "EMAVQ")
    },
    "taming.models.cond_transformer": {
        "Net2NetTransformer": f"{_MODELS}.prior:Net2NetTransformer",
        "disabled_train": f"{_MODELS}.prior:disabled_train",
    },
    "taming.models.dummy_cond_stage": {"DummyCondStage": f"{_MODELS}.condition_stages:DummyCondStage"},
    "taming.modules.diffusionmodules.model": {
        name: f"{_MODELS}.autoencoder:{name}"
        for name in ("Encoder", "Decoder", "ResnetBlock", "AttnBlock", "Upsample", "Downsample", "Normalize")
    },
    "taming.modules.discriminator.model": {
        "NLayerDiscriminator": f"{_MODELS}.discriminator:NLayerDiscriminator",
        "weights_init": f"{_MODELS}.discriminator:weights_init",
    },
    "taming.modules.util": {
        "ActNorm": f"{_MODELS}.discriminator:ActNorm",
        "Labelator": f"{_MODELS}.condition_stages:Labelator",
        "SOSProvider": f"{_MODELS}.condition_stages:SOSProvider",
    },
    "taming.modules.misc.coord": {"CoordStage": f"{_MODELS}.condition_stages:CoordStage"},
    "taming.modules.vqvae.quantize": {
        # The original's VQModel imports the second under the name of the first.
        "VectorQuantizer": f"{_MODELS}.quantize:OneHotVectorQuantizer",
        "VectorQuantizer2": f"{_MODELS}.quantize:VectorQuantizer",
        "GumbelQuantize": f"{_MODELS}.quantize:GumbelQuantize",
        "EMAVectorQuantizer": f"{_MODELS}.quantize:EMAVectorQuantizer",
        "EmbeddingEMA": f"{_MODELS}.quantize:EmbeddingEMA",
    },
    "taming.modules.transformer.mingpt": {
        "GPT": f"{_MODELS}.gpt:GPT",
        "GPTConfig": f"{_MODELS}.gpt:GPTConfig",
        "Block": f"{_MODELS}.gpt:Block",
        "CausalSelfAttention": f"{_MODELS}.gpt:CausalSelfAttention",
        "sample": f"{_MODELS}.gpt:sample",
        "sample_with_past": f"{_MODELS}.gpt:sample_with_past",
        "top_k_logits": f"{_MODELS}.gpt:top_k_logits",
        "top_k_top_p_filtering": f"{_MODELS}.gpt:top_k_top_p_filtering",
        "KMeans": f"{_MODELS}.color_clusters:KMeans",
    },
    "taming.modules.transformer.permuter": {
        name: f"{_MODELS}.orderings:{name}"
        for name in (
            "AbstractPermuter",
            "Identity",
            "Subsample",
            "ZCurve",
            "SpiralOut",
            "SpiralIn",
            "Random",
            "AlternateParsing",
        )
    },
    "taming.modules.losses.vqperceptual": {
        **{
            name: f"{_MODELS}.losses:{name}"
            for name in ("DummyLoss", "VQLPIPSWithDiscriminator", "adopt_weight", "hinge_d_loss", "vanilla_d_loss")
        },
        # latent-diffusion imports these from here with `import *`.
        "LPIPS": f"{_MODELS}.lpips:LPIPS",
        "NLayerDiscriminator": f"{_MODELS}.discriminator:NLayerDiscriminator",
        "weights_init": f"{_MODELS}.discriminator:weights_init",
        "F": "torch.nn:functional",
        "nn": "torch:nn",
    },
    "taming.modules.losses": {"DummyLoss": f"{_MODELS}.losses:DummyLoss"},
    "taming.modules.losses.segmentation": {
        name: f"{_MODELS}.losses:{name}" for name in ("BCELoss", "BCELossWithQuant")
    },
    "taming.modules.losses.lpips": {"LPIPS": f"{_MODELS}.lpips:LPIPS"},
    "taming.lr_scheduler": {"LambdaWarmUpCosineScheduler": f"{_MODELS}.vqgan:LambdaWarmUpCosineScheduler"},
    "taming.data.custom": {
        "CustomTrain": f"{_LISTS}:CustomTrain",
        "CustomTest": f"{_LISTS}:CustomTest",
    },
    "taming.data.imagenet": {
        name: f"{_SETS}:{name}"
        for name in (
            "ImageNetTrain",
            "ImageNetValidation",
            "ImageNetTrainWithDepth",
            "ImageNetValidationWithDepth",
            "RINTrainWithDepth",
            "RINValidationWithDepth",
        )
    },
    "taming.data.faceshq": {name: f"{_SETS}:{name}" for name in ("FacesHQTrain", "FacesHQValidation")},
    "taming.data.sflckr": {"Examples": f"{_SETS}:FlickrExamples", "SegmentationBase": f"{_SETS}:SegmentationBase"},
    "taming.data.ade20k": {
        "Examples": f"{_SETS}:ADE20kExamples",
        "ADE20kTrain": f"{_SETS}:ADE20kTrain",
        "ADE20kValidation": f"{_SETS}:ADE20kValidation",
    },
    "taming.data.coco": {
        "Examples": f"{_SETS}:CocoExamples",
        "CocoImagesAndCaptionsTrain": f"{_SETS}:CocoImagesAndCaptionsTrain",
        "CocoImagesAndCaptionsValidation": f"{_SETS}:CocoImagesAndCaptionsValidation",
    },
    "taming.data.annotated_objects_coco": {"AnnotatedObjectsCoco": f"{_OBJECTS}:AnnotatedObjectsCoco"},
    "taming.data.annotated_objects_open_images": {
        "AnnotatedObjectsOpenImages": f"{_OBJECTS}:AnnotatedObjectsOpenImages"
    },
    "ldm.modules.diffusionmodules.model": {
        name: f"{_MODELS}.autoencoder:{name}"
        for name in ("Encoder", "Decoder", "ResnetBlock", "AttnBlock", "Upsample", "Downsample", "Normalize")
    },
    "ldm.util": {"instantiate_from_config": f"{_CONFIG}:instantiate_from_config"},
    # latent-diffusion's VQModel differs in how it is trained only.
    "ldm.models.autoencoder": {name: f"{_MODELS}.vqgan:{name}" for name in ("VQModel", "VQModelInterface")},
    "ldm.lr_scheduler": {"LambdaWarmUpCosineScheduler": f"{_MODELS}.vqgan:LambdaWarmUpCosineScheduler"},
    "main": {"instantiate_from_config": f"{_CONFIG}:instantiate_from_config"},
    "taming.util": {"instantiate_from_config": f"{_CONFIG}:instantiate_from_config"},
}


def resolve(target: str) -> Any:
    """The object that a dotted name stands for: our counterpart of a name of the original, else what the name imports.

    Raises KeyError for a name of the original that has no counterpart, and ImportError, AttributeError or ValueError
    for any other name that cannot be imported.
    """
    module, name = _home(target)
    return getattr(importlib.import_module(module), name)


def is_ours(target: str, package: str = "models") -> bool:
    """Whether a dotted name belongs to our ``package``: today's name, an older one, or one of the original."""
    try:
        module, _ = _home(target)
    except KeyError:
        return True  # `resolve` says that it has no counterpart
    return module.startswith(f"tamingfast.{package}.")


def original_name(target: str) -> str | None:
    """The original's name, ``taming.*``, of a class that a config names in whichever way; None if it has none."""
    try:
        home = ":".join(_home(target))
    except KeyError:
        return None
    names = (f"{path}.{name}" for path, members in NAMES.items() for name, ours in members.items() if ours == home)
    return next((name for name in names if name.startswith("taming.")), None)


def _home(target: str) -> tuple[str, str]:
    """Module and name that a dotted name stands for, without importing anything."""
    module, _, name = target.rpartition(".")
    if name in NAMES.get(module, {}):
        module, name = NAMES[module][name].split(":")
    elif module.startswith("taming."):
        raise KeyError(target)
    return new_name(module), name


#: What an error says of a name of the original that is found nowhere.
LACKING = (
    "tamingfast has no counterpart of it, and no copy of the original that has it can be found; put one on PYTHONPATH, "
    "whose names are then used beside ours"
)


def install() -> None:
    """Make imports of ``taming`` and ``ldm`` find our classes, so that code written for the original runs on them.

    The effect is that of a copy of ours that lies before all others on the path: modules and names that have no
    counterpart here come from the copy of the original that can be found, if any, whether it is imported before or
    after this call. Classes are looked up on first use. The original's top-level ``main`` is not replaced, because a
    program may have a ``main`` of its own.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not getattr(finder, "finds_stand_ins", False)]
    sys.meta_path.insert(0, _Finder())
    for path in sorted(_served()):  # packages before what they contain
        known = sys.modules.get(path)
        if getattr(type(known), "is_stand_in", False):
            continue
        module = sys.modules[path] = importlib.util.module_from_spec(_spec(path))
        if known is not None:
            vars(module)["_original"] = known
        parent, _, leaf = path.rpartition(".")
        for holder in (sys.modules.get(parent), vars(sys.modules[parent]).get("_original") if parent else None):
            if holder is not None:
                setattr(holder, leaf, module)


def _served() -> set[str]:
    """The original's modules that have names here, and the packages around them."""
    paths = [path.split(".") for path in NAMES if path.startswith(SERVED)]
    return {".".join(parts[:depth]) for parts in paths for depth in range(1, len(parts) + 1)}


def _spec(path: str) -> importlib.machinery.ModuleSpec:
    spec = importlib.machinery.ModuleSpec(path, _Finder(), is_package=True)
    spec.submodule_search_locations = _Folders(path)  # type: ignore[assignment]  # a sequence is all that is needed
    return spec


def _original_spec(path: str) -> importlib.machinery.ModuleSpec | None:
    """Where the original's module can be found now, if anywhere."""
    parent = path.rpartition(".")[0]
    folders = _Folders(parent) if parent else None
    others = [finder for finder in sys.meta_path if not getattr(finder, "finds_stand_ins", False)]
    specs = (finder.find_spec(path, folders) for finder in others if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)


def _is_imported_from(frame: types.FrameType) -> bool:
    """Whether a frame is at ``from ... import ...``, which shall say more than that there is no such attribute."""
    return frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_FROM"]


class _StandIn(types.ModuleType):
    """A module of the original whose names are looked up in `NAMES`, and then in the original itself."""

    is_stand_in: ClassVar[bool] = True

    def __getattr__(self, name: str) -> Any:
        path = self.__name__
        if name in NAMES.get(path, {}):
            return resolve(f"{path}.{name}")
        if name == "__file__" and (file := self._file()) is not None:
            return file
        # Programs ask every module for names such as __file__; that must not run the original's code.
        original = None if name.startswith("__") else self._load_original()
        if original is not None and hasattr(original, name):
            return getattr(original, name)
        if _is_imported_from(sys._getframe(1)):
            raise ImportError(f"cannot import name {name!r} from {path!r}: {LACKING}", name=path)
        raise AttributeError(f"tamingfast has no counterpart of {path}.{name}, and no copy of the original has it")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *NAMES.get(self.__name__, {}), *dir(vars(self).get("_original"))})

    def _file(self) -> str | None:
        """The original's file, beside which programs look for others, if it can be found; nothing is run."""
        if "_original" in vars(self):
            return getattr(vars(self)["_original"], "__file__", None)
        spec = _original_spec(self.__name__)
        return spec.origin if spec is not None and spec.has_location else None

    def _load_original(self) -> types.ModuleType | None:
        """The original's module, run on first use under its own name, but not registered under it."""
        held = vars(self)
        if "_original" not in held and (spec := _original_spec(self.__name__)) is not None:
            held["_original"] = importlib.util.module_from_spec(spec)  # before it runs: it may import itself
            try:
                if spec.loader is not None:  # None for a folder without __init__.py
                    spec.loader.exec_module(held["_original"])
            except BaseException:
                del held["_original"]
                raise
        return held.get("_original")


class _Folders(Sequence[str]):
    """The folders of a package of the original, as they are at the time of asking."""

    def __init__(self, package: str) -> None:
        self.package = package

    def _now(self) -> list[str]:
        known = vars(sys.modules[self.package]).get("_original") if self.package in sys.modules else None
        if known is not None:
            return list(getattr(known, "__path__", ()))
        spec = _original_spec(self.package)
        return list(spec.submodule_search_locations or ()) if spec is not None else []

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._now()[index]

    def __len__(self) -> int:
        return len(self._now())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins before any other module of their names."""

    finds_stand_ins: ClassVar[bool] = True

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return _spec(name) if name in _served() else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name, f"Stand-in for {spec.name}, provided by tamingfast.")
        module.__all__ = list(NAMES.get(spec.name, {}))  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).pop("_original", None)  # a reload loads it again
