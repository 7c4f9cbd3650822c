"""Digests of weights, by which files tell one model from another.

Both are stored on disk, `fingerprint` in token files and runs, `identity` in canvases, so neither may ever change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """A 128-bit digest, hexadecimal, of a first stage's weights without its loss, in any order and floating dtype."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    # `colorize` holds the random colours in which label maps are drawn.
    kept = ((key, value) for key, value in sorted(state.items()) if not key.startswith(("loss.", "colorize")))
    return _sha256("", ((f"{key}{tuple(value.shape)}", value.float()) for key, value in kept))[:32]


def identity(model: nn.Module) -> str:
    """SHA-256, hexadecimal, of all that a prior's tokens depend on: the transformer's weights and number of heads."""
    gpt: Any = getattr(model, "transformer", model)
    head = f"{gpt.config.n_head} {gpt.config.n_unmasked}"
    named = gpt.named_parameters()
    return _sha256(head, ((f"{name} {tuple(value.shape)} {value.dtype}", value) for name, value in named))


def _sha256(head: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, hexadecimal, of ``head``, then of each tensor's label and bytes."""
    digest = hashlib.sha256(head.encode())
    for label, value in tensors:
        digest.update(label.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
