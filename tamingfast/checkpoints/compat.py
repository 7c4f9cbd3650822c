"""The original repository's dotted names, and where each lives here.

Configs say ``target: taming.models.vqgan.VQModel``; third-party code imports the same names.
`resolve` turns such a name into our class, `install` makes the imports work.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from typing import Any

from tamingfast.renamed import new_name

_MODELS = "tamingfast.models"

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
    "taming.models.dummy_cond_stage": {"DummyCondStage": f"{_MODELS}.conditioning:DummyCondStage"},
    "taming.modules.diffusionmodules.model": {
        name: f"{_MODELS}.vqgan:{name}"
        for name in ("Encoder", "Decoder", "ResnetBlock", "AttnBlock", "Upsample", "Downsample", "Normalize")
    },
    "taming.modules.discriminator.model": {
        "NLayerDiscriminator": f"{_MODELS}.discriminator:NLayerDiscriminator",
        "weights_init": f"{_MODELS}.discriminator:weights_init",
    },
    "taming.modules.util": {
        "ActNorm": f"{_MODELS}.discriminator:ActNorm",
        "Labelator": f"{_MODELS}.conditioning:Labelator",
        "SOSProvider": f"{_MODELS}.conditioning:SOSProvider",
    },
    "taming.modules.misc.coord": {"CoordStage": f"{_MODELS}.conditioning:CoordStage"},
    "taming.modules.vqvae.quantize": {
        # The second is what the original's VQModel imports under the first one's name.
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
        name: f"tamingfast.models.orderings:{name}"
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
            name: f"tamingfast.models.losses:{name}"
            for name in ("DummyLoss", "VQLPIPSWithDiscriminator", "adopt_weight", "hinge_d_loss", "vanilla_d_loss")
        },
        # latent-diffusion takes these from here, with `import *`.
        "LPIPS": "tamingfast.models.lpips:LPIPS",
        "NLayerDiscriminator": f"{_MODELS}.discriminator:NLayerDiscriminator",
        "weights_init": f"{_MODELS}.discriminator:weights_init",
        "F": "torch.nn:functional",
        "nn": "torch:nn",
    },
    "taming.modules.losses": {"DummyLoss": "tamingfast.models.losses:DummyLoss"},
    "taming.modules.losses.segmentation": {
        name: f"tamingfast.models.losses:{name}" for name in ("BCELoss", "BCELossWithQuant")
    },
    "taming.modules.losses.lpips": {"LPIPS": "tamingfast.models.lpips:LPIPS"},
    "taming.lr_scheduler": {"LambdaWarmUpCosineScheduler": f"{_MODELS}.vqgan:LambdaWarmUpCosineScheduler"},
    "taming.data.custom": {
        "CustomTrain": "tamingfast.data.image_lists:CustomTrain",
        "CustomTest": "tamingfast.data.image_lists:CustomTest",
    },
    "main": {"instantiate_from_config": "tamingfast.checkpoints.config:instantiate_from_config"},
    "taming.util": {"instantiate_from_config": "tamingfast.checkpoints.config:instantiate_from_config"},
}


def resolve(target: str) -> Any:
    """The object that a config's dotted ``target`` names, ours where the original's name is known.

    Raises KeyError when the name belongs to the original but has no counterpart here, and ImportError or
    AttributeError when it is somebody else's and cannot be imported.
    """
    module, _, name = target.rpartition(".")
    if module in NAMES:
        module, name = NAMES[module][name].split(":")
    elif module.startswith("taming."):
        raise KeyError(target)
    return getattr(importlib.import_module(new_name(module)), name)


def install() -> None:
    """Register ``taming.*`` in `sys.modules`, so that code and configs written for the original find our classes.

    Classes are looked up on first use. An installed ``taming`` package is shadowed until the process ends.
    The original's top-level ``main`` is left alone: a program's own ``main`` may bear that name.
    """
    for path in NAMES:
        if not path.startswith("taming"):
            continue
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            _ensure_module(".".join(parts[:depth]))


def _ensure_module(path: str) -> None:
    existing = sys.modules.get(path)
    if existing is not None and getattr(existing, "__tamingfast__", False):
        return
    module = types.ModuleType(path, f"Stand-in for {path}, served by tamingfast.")
    module.__tamingfast__ = True
    module.__path__ = []  # marks a package, so that submodules can be imported from it
    module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
    known = NAMES.get(path, {})

    def lookup(name: str) -> Any:
        if name in known:
            return resolve(f"{path}.{name}")
        raise AttributeError(f"tamingfast has no counterpart of {path}.{name}")

    module.__getattr__ = lookup
    module.__all__ = list(known)
    sys.modules[path] = module
    parent, _, leaf = path.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
