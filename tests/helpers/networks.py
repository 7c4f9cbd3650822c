"""Tiny models of every kind, for tests that need their structure but no particular weights."""

from __future__ import annotations

from typing import Any

from tamingfast.models.prior import Net2NetTransformer

DUMMY = {"target": "taming.modules.losses.DummyLoss"}
DDCONFIG = {
    "double_z": False, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
}  # fmt: skip


def prior(
    cond: str | dict = "__is_unconditional__",
    vocab: int = 12,
    block: int = 17,
    permuter: dict | None = None,
    **options: Any,
) -> Net2NetTransformer:
    """A prior of two layers on a VQModel with f = 2; ``options`` are further arguments of the class."""
    gpt = {"vocab_size": vocab, "block_size": block, "n_layer": 2, "n_head": 2, "n_embd": 16}
    stage = {"ddconfig": DDCONFIG, "lossconfig": DUMMY, "n_embed": 12, "embed_dim": 4}
    return Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        {"target": "taming.models.vqgan.VQModel", "params": stage},
        cond,
        permuter,
        **options,
    )
