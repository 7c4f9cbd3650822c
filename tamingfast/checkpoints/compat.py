"""The original's dotted names and their counterparts here.

Configs contain ``target: taming.models.vqgan.VQModel``, and third-party code imports such names. `resolve` finds our
class for such a name, `install` makes the imports work.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from typing import Any

from tamingfast.renamed import new_name

_MODELS = "tamingfast.models"
_CONFIG = "tamingfast.checkpoints.config"
_LISTS = "tamingfast.data.image_lists"

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
    # latent-diffusion's class of this name differs in how it is trained only; `VQModelInterface` encodes differently.
    "ldm.models.autoencoder": {"VQModel": f"{_MODELS}.vqgan:VQModel"},
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


def is_ours(target: str) -> bool:
    """Whether a dotted name belongs to `tamingfast.models`: today's name, an older one, or one of the original."""
    try:
        module, _ = _home(target)
    except KeyError:
        return True  # `resolve` says that it has no counterpart
    return module.startswith(f"{_MODELS}.")


def _home(target: str) -> tuple[str, str]:
    """Module and name that a dotted name stands for, without importing anything."""
    module, _, name = target.rpartition(".")
    if module in NAMES:
        module, name = NAMES[module][name].split(":")
    elif module.startswith("taming."):
        raise KeyError(target)
    return new_name(module), name


def install() -> None:
    """Register ``taming.*`` in `sys.modules`, so that code and configs written for the original find our classes.

    Classes are looked up on first use. An installed ``taming`` package is hidden until the process ends. The original's
    top-level ``main`` is not registered, because a program may have a ``main`` of its own.
    """
    for path in NAMES:
        if not path.startswith("taming"):
            continue
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            _ensure_module(".".join(parts[:depth]))


class _StandIn(types.ModuleType):
    """A module of the original whose names are looked up in `NAMES`."""

    def __init__(self, path: str) -> None:
        super().__init__(path, f"Stand-in for {path}, provided by tamingfast.")
        self.__path__: list[str] = []  # makes it a package, from which submodules can be imported
        self.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
        self.__all__ = list(NAMES.get(path, {}))

    def __getattr__(self, name: str) -> Any:
        path = self.__name__
        if name in NAMES.get(path, {}):
            return resolve(f"{path}.{name}")
        raise AttributeError(f"tamingfast has no counterpart of {path}.{name}")


def _ensure_module(path: str) -> None:
    if isinstance(sys.modules.get(path), _StandIn):
        return
    module = sys.modules[path] = _StandIn(path)
    parent, _, leaf = path.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
