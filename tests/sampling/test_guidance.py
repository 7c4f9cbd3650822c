"""Classifier-free guidance: the tokens of two full forward passes for each, whatever engine and lookahead."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from engine_cases import HostEngine
from gpts import prior, tiny_gpt, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tamingfast.engines import DecodeRequest, GPTEngine, lending
from tamingfast.engines.request import Second
from tamingfast.errors import UserError
from tamingfast.models.condition_stages import Labelator
from tamingfast.ops import backends
from tamingfast.ops.choice import gumbel_noise
from tamingfast.sampling import sample_grid
from tamingfast.sampling.schedule import RULES, make_schedule

ENGINES = ("naive", "torch", *(["native"] if backends.native()[0] else []))
SIDE, CODES, CLASSES = 5, 20, 3


def guided_prior(order: Tensor | None = None, seed: int = 0) -> nn.Module:
    model = prior(tiny_gpt(seed=seed), order, CODES)
    model.cond_stage_model = Labelator(CLASSES, null_class=True)
    return model


MODEL = guided_prior()
LABELS = torch.tensor([[2], [0]])


@functools.cache
@torch.no_grad()
def plainly(window: int, schedule: str, scales: tuple[float, ...], seed: int) -> Tensor:
    """One cell after the other, each from two full forward passes over its window; ``scales`` by the cell's turn."""
    gpt, labels, side = MODEL.transformer, LABELS, SIDE
    grid = torch.zeros(len(labels), side * side, dtype=torch.int64)
    layout = make_schedule(side, side, window, schedule, 2)
    turn = 0
    for run in layout.runs:
        cells = layout.cells(run)
        for step in run.steps:
            cell = int(cells[step])
            for image, label in enumerate(labels[:, 0].tolist()):
                seen = grid[image, cells[:step]]
                inputs = [torch.cat((torch.tensor([c]), seen))[None] for c in (label, CLASSES)]
                own, null = (gpt(tokens)[0][0, -1, :CODES] for tokens in inputs)
                scores = (null + scales[turn] * (own - null)) / 0.8
                scores[scores < scores.topk(7).values[-1]] = -torch.inf
                place = [torch.tensor(value) for value in (image, *divmod(cell, side))]
                grid[image, cell] = (scores + gumbel_noise(seed, *place, CODES)).argmax()
            turn += 1
    return grid.view(-1, side, side)


CONSTANT = (3.0,) * SIDE**2
COSINE = tuple(1 + 2 * (1 - math.cos(math.pi * t / (SIDE**2 - 1))) / 2 for t in range(SIDE**2))
OPTIONS = {"temperature": 0.8, "top_k": 7, "stride": 2}


@pytest.mark.parametrize("lookahead", [1, 3, 40, None])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("cfg", "scales"), [(3, CONSTANT), ("3", CONSTANT), ("3:cosine", COSINE)])
def test_one_window(engine, lookahead, cfg, scales):
    expected = plainly(SIDE, "paper", scales, 5)
    found = sample_grid(
        MODEL, LABELS, SIDE, SIDE, window=SIDE, engine=engine, lookahead=lookahead, cfg=cfg, seed=5, **OPTIONS
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lookahead", [1, 4, None])
@pytest.mark.parametrize("schedule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_sliding_windows(engine, schedule, lookahead):
    expected = plainly(4, schedule, COSINE, 1)
    found = sample_grid(
        MODEL, LABELS, SIDE, SIDE, window=4, schedule=schedule, engine=engine, lookahead=lookahead, cfg="3:cosine",
        seed=1, **OPTIONS,
    )  # fmt: skip
    assert torch.equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_known_tokens_orders_and_batches(data):
    draw = data.draw
    order = torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    model = guided_prior(order, seed=draw(st.integers(0, 3)))
    start = tokens(3, SIDE, SIDE, seed=draw(st.integers(0, 99))) % CODES
    mask = torch.rand(3, SIDE, SIDE) < draw(st.sampled_from([0.3, 0.7, 2]))
    labels = torch.tensor([[0], [1], [2]])
    options = {
        "window": SIDE, "cfg": draw(st.sampled_from([0.0, 0.5, 2.0, "7:cosine"])), "seed": draw(st.integers(0, 99)),
        "greedy": draw(st.booleans()),
    }  # fmt: skip
    expected = sample_grid(model, labels, SIDE, SIDE, engine="naive", start=start, mask=mask, **options)
    engine, lookahead = draw(st.sampled_from(ENGINES)), draw(st.sampled_from([1, 2, 5, None]))
    for image in range(3):
        alone = sample_grid(
            model, labels[image, None], SIDE, SIDE, engine=engine, lookahead=lookahead, first_image=image,
            start=start[image, None], mask=mask[image, None], **options,
        )  # fmt: skip
        assert torch.equal(alone, expected[image, None])
    assert torch.equal(expected[~mask], start[~mask])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_weights(dtype):
    if "native" not in ENGINES:
        pytest.skip("the extension is not built")
    grids = [
        sample_grid(MODEL, LABELS, SIDE, SIDE, window=SIDE, dtype=dtype, lookahead=lookahead, cfg=3.0, seed=2)
        for lookahead in (1, 6, None)
    ]
    assert torch.equal(grids[0], grids[1])
    assert torch.equal(grids[0], grids[2])


def test_a_copy_that_guesses():
    if "native" not in ENGINES:
        pytest.skip("the extension is not built")
    found = []
    for drafts, lookahead in ((False, 1), (True, 5), (True, None)):
        engine = GPTEngine(MODEL.transformer, drafts=drafts)
        engine.reserve(4, 40)
        sequences = tokens(2, 36)
        second = Second(slots=[3, 2], null=CLASSES, prefix=2, scales=[2.5] * 34)
        engine.decode(
            DecodeRequest(slots=[0, 1], sequences=sequences, steps=range(2, 36), lookahead=lookahead, second=second)
        )
        assert {engine.length(slot) for slot in range(4)} == {35}
        found.append(sequences)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 1]}, "slot: got"), ({"slots": [2, 9]}, "slot: got 9"), ({"slots": [2]}, "second.slots: got 1"),
        ({"scales": [1.0]}, "second.scales: got 1"), ({"prefix": 37}, "second.prefix: got 37"),
        ({"null": 24}, "second.null: got 24"),
    ],
)  # fmt: skip
def test_wrong_second_sequences(change, message):
    if "native" not in ENGINES:
        pytest.skip("the extension is not built")
    engine = GPTEngine(MODEL.transformer)
    engine.reserve(4, 40)
    second = {"slots": [3, 2], "null": CLASSES, "prefix": 1, "scales": [2.5] * 34} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        engine.decode(DecodeRequest(slots=[0, 1], sequences=tokens(2, 36), steps=range(2, 36), second=Second(**second)))


def test_the_cuda_engine_chooses_in_torch(monkeypatch, caplog):
    monkeypatch.setitem(lending.ENGINES, "cpu", HostEngine)
    for lookahead in (None, 3):
        found = sample_grid(
            guided_prior(), LABELS, SIDE, SIDE, window=SIDE, engine="native", lookahead=lookahead, cfg=3, seed=5,
            **OPTIONS,
        )  # fmt: skip
        assert torch.equal(found, plainly(SIDE, "paper", CONSTANT, 5))
    assert caplog.text.count("tokens are chosen in torch") <= 1


def test_scales_without_effect_and_those_with_all():
    plain = sample_grid(MODEL, LABELS, SIDE, SIDE, window=SIDE)
    assert torch.equal(sample_grid(MODEL, LABELS, SIDE, SIDE, window=SIDE, cfg=1), plain)
    null = torch.full_like(LABELS, CLASSES)
    assert torch.equal(
        sample_grid(MODEL, LABELS, SIDE, SIDE, window=SIDE, cfg=0), sample_grid(MODEL, null, SIDE, SIDE, window=SIDE)
    )


@pytest.mark.parametrize("cfg", ["x", "3:steps", -1, math.nan, math.inf, "", ":cosine", True, 1e9, [3]])
def test_wrong_scales(cfg):
    with pytest.raises(UserError, match="^cfg: got .*, expected a scale from 0 to 1000"):
        sample_grid(MODEL, LABELS, SIDE, SIDE, window=SIDE, cfg=cfg)


def test_a_prior_without_a_null_class():
    with pytest.raises(UserError, match="^cfg: got 3, expected None or 1, as this prior has no null class"):
        sample_grid(prior(tiny_gpt()), LABELS, SIDE, SIDE, window=SIDE, cfg=3)
