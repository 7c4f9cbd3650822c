"""Families of checkpoints whose networks descend from the original's: one file each, and the choice among them.

A checkpoint is recognised by its config, or by names of weights that no other family has, and never by a guess that
could be silently wrong: where neither says enough, the family refuses it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tamingfast.checkpoints.formats import (
    diffusers,
    latent_diffusion,
    llamagen,
    llamagen_gpt,
    maskgit,
    seed_voken,
    vqgan_jax,
)
from tamingfast.checkpoints.formats.family import UNSEEN, Family, Opened, Source

FAMILIES = (
    latent_diffusion.FAMILY,
    llamagen.FAMILY,
    llamagen.JANUS,
    llamagen_gpt.FAMILY,
    seed_voken.IBQ,
    seed_voken.MAGVIT,
    diffusers.FAMILY,
    maskgit.FAMILY,
    vqgan_jax.FAMILY,
)

__all__ = ["FAMILIES", "UNSEEN", "Family", "Opened", "Source", "family_of"]


def family_of(config: Any, names: Collection[str] = ()) -> Family | None:
    """The family of a checkpoint with this config, or, if it has none, with weights of these names."""
    if config is not None:
        return next((family for family in FAMILIES if isinstance(config, Mapping) and family.named(config)), None)
    return next((family for family in FAMILIES if family.shown(names)), None)
