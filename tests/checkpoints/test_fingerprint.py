"""Fingerprints, which files on disk contain and which must therefore never change."""

from __future__ import annotations

import golden
import torch

import tamingfast
from tamingfast.checkpoints.fingerprint import fingerprint, identity
from tamingfast.checkpoints.weights import read_state_dict

FIRST_STAGE = "db8f3d072fb37852c021de965d24f11b"
PRIOR = "86c362e8f8c428214ad99806d443cdc175b22120789b46c504b22a4a5a4e4d3e"


def test_digests_are_those_of_version_0_1_0():
    first_stage = tamingfast.load_model(golden.checkpoint("vqsegmentation_f2"))
    assert fingerprint(first_stage) == fingerprint(first_stage.state_dict()) == FIRST_STAGE
    prior = tamingfast.load_model(golden.checkpoint("net2net_unmasked"))
    assert identity(prior) == identity(prior.transformer) == PRIOR


def test_fingerprints_ignore_the_loss_the_order_and_the_colours():
    state = read_state_dict(golden.checkpoint("vqsegmentation_f2"))
    other = dict(reversed(state.items())) | {"loss.weight": torch.ones(1), "colorize": torch.ones(1)}
    assert fingerprint(other) == fingerprint(state)
    other["quant_conv.bias"] = other["quant_conv.bias"] + 1e-3
    assert fingerprint(other) != fingerprint(state)


def test_identities_tell_dtypes_and_heads_apart():
    prior = tamingfast.load_model(golden.checkpoint("net2net_unmasked"))
    prior.transformer.config.n_head *= 2
    more_heads = identity(prior)
    prior.transformer.config.n_head //= 2
    assert len({PRIOR, more_heads, identity(prior.to(torch.bfloat16))}) == 3
