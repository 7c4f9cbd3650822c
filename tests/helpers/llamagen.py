"""LlamaGen's transformer: the outputs of the public code for a tiny checkpoint, and small models of our own."""

from __future__ import annotations

import functools
import shutil
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from tamingfast.models.condition_stages import Labelator
from tamingfast.models.llama_gpt import LlamaGPT

_ARCHIVE = Path(__file__).parents[1] / "data" / "llamagen-gpt.tar.xz"
CLASSES, CODES = 5, 24


@functools.cache
def folder() -> Path:
    """The checkpoint (a bare state dict), its config.json and its outputs."""
    home = Path(tempfile.mkdtemp())
    with tarfile.open(_ARCHIVE) as archive:
        archive.extractall(home, filter="data")
    return home / "c2i-fsdp"


def checkpoint() -> Path:
    return folder() / "c2i_tiny_fsdp.pt"


@functools.cache
def outputs() -> dict[str, Tensor]:
    with np.load(folder() / "golden.npz") as found:
        return {name: torch.from_numpy(value) for name, value in found.items()}


def copied_to(home: Path, name: str = "model.pt", config: bool = True) -> Path:
    """The checkpoint under another name, with its config beside it or without."""
    shutil.copy(checkpoint(), home / name)
    if config:
        shutil.copy(folder() / "config.json", home / "config.json")
    return home / name


def tiny_llama(side: int = 5, heads: int = 2, width: int = 24, hidden: int = 64, seed: int = 0) -> LlamaGPT:
    """A small transformer whose weights are large enough for its tokens to depend on the whole context."""
    gpt = LlamaGPT(CODES, CLASSES, side * side, 2, heads, width, hidden)
    generator = torch.Generator().manual_seed(seed)
    for parameter in gpt.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4, generator=generator)
        else:
            nn.init.normal_(parameter, mean=1.0, std=0.2, generator=generator)
    return gpt.eval()


def prior(gpt: LlamaGPT) -> nn.Module:
    """A module with the parts of a `Net2NetTransformer` that `sample_grid` needs."""
    model = nn.Module()
    model.transformer = gpt
    model.cond_stage_model = Labelator(gpt.n_classes, null_class=True, first=gpt.config.vocab_size)
    model.first_stage_model = nn.Module()
    model.first_stage_model.quantize = SimpleNamespace(re_embed=gpt.config.vocab_size)
    return model
