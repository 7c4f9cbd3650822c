"""`sample_grid`: error messages name the wrong argument."""

from __future__ import annotations

import copy

import pytest
import torch
from gpts import VOCAB, tokens

from tamingfast.ops import backends
from tamingfast.sampling import sample_grid

ENGINES = ("torch", "naive", *(["native"] if backends.native()[0] else []))

MASK = torch.ones(4, 4, dtype=torch.bool)
MISTAKES = {
    "block size": (
        dict(cond=tokens(1, 26)),
        "window: got 4 x 4 tokens after 26 conditioning tokens, a sequence of 41, expected at most .* 40",
    ),
    "schedule": (dict(schedule="spiral"), "schedule: got 'spiral'"),
    "stride": (dict(schedule="strided", window=4), "stride: got 8"),
    "height": (dict(height=0), "height: got 0"),
    "temperature": (dict(temperature=0.0), "temperature: got 0.0, .* greedy"),
    "top_k": (dict(top_k=0), "top_k: got 0"),
    "top_p": (dict(top_p=2.0), "top_p: got 2.0"),
    "seed": (dict(seed=-1), "seed: got -1"),
    "first image": (dict(first_image=-1), "first_image: got -1"),
    "engine": (dict(engine="cuda"), "engine: got 'cuda', expected one of auto, native, torch, naive"),
    "dtype": (dict(dtype="float8"), "dtype: got 'float8'"),
    "int8": (dict(dtype="int8", engine="torch"), "dtype: got 'int8', .* only the native engine"),
    "cond rank": (dict(cond=tokens(1)), "cond: got shape"),
    "cond empty": (dict(cond=tokens(1, 0)), "cond: got shape"),
    "cond grid": (dict(cond=tokens(1, 4, 5)), r"cond: got shape \(1, 4, 5\)"),
    "cond type": (dict(cond=torch.zeros(1, 2)), "cond: got dtype torch.float32"),
    "cond range": (dict(cond=torch.tensor([[VOCAB]])), "cond: got tokens from 24 to 24, expected 0 to 23"),
    "mask alone": (dict(mask=MASK), "start: got .* as there is a mask"),
    "mask with a prefix": (dict(mask=MASK, start=tokens(1, 3)), "start: got .* as there is a mask"),
    "mask type": (dict(mask=MASK.int(), start=tokens(1, 4, 4)), "mask: got torch.int32"),
    "mask shape": (dict(mask=MASK[:3], start=tokens(1, 4, 4)), "mask: got torch.bool"),
    "start range": (dict(mask=~MASK, start=tokens(1, 4, 4) - 30), "start: got tokens"),
    "start grid without mask": (dict(start=tokens(1, 4, 4)), "or a mask as well"),
    "start too long": (dict(start=tokens(1, 17)), "first k of 16"),
    "start of another batch": (dict(start=tokens(2, 3)), r"start: got shape \(2, 3\)"),
    "start on a sliding window": (
        dict(start=tokens(1, 3), window=3),
        "expected both where several windows cover a grid",
    ),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(gpt, options, message):
    options = dict(cond=tokens(1, 2), height=4, width=4) | options
    with pytest.raises(ValueError, match=message):
        sample_grid(gpt, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_broken_weights_are_named(gpt, engine):
    gpt = copy.deepcopy(gpt)
    with torch.no_grad():
        gpt.head.weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="logits: got NaN"):
        sample_grid(gpt, tokens(1, 2), 4, 4, engine=engine)


def test_the_old_name_of_engine_is_accepted_with_a_warning(gpt):
    with pytest.warns(DeprecationWarning, match="engine="):
        old = sample_grid(gpt, tokens(1, 2), 3, 3, seed=1, backend="naive")
    assert torch.equal(old, sample_grid(gpt, tokens(1, 2), 3, 3, seed=1, engine="naive"))
