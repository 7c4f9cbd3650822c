"""Lookahead in the CUDA engine: the tokens of one after the other; on a GPU, and with its kernels run on the CPU."""

from __future__ import annotations

import pytest
import torch
from engine_cases import decoded, request
from gpts import random_gpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tamingfast.engines import CudaEngine
from tamingfast.engines.cuda import decoding
from tamingfast.engines.cuda.window import Window
from tamingfast.models.gpt import GPT

VOCAB, LENGTH, BATCH = 24, 18, 3


def predictable_gpt(n_unmasked: int = 0, width: int = 32) -> GPT:
    """A transformer of which some tokens can be guessed from the token before, others not."""
    gpt = random_gpt(VOCAB, LENGTH, n_unmasked=n_unmasked, width=width)
    with torch.no_grad():
        gpt.head.weight.copy_(gpt.tok_emb.weight.roll(1, 0) * 20)
    return gpt


MODELS = {
    "predictable": predictable_gpt(), "random": random_gpt(VOCAB, LENGTH), "prefix": predictable_gpt(4),
    "odd width": predictable_gpt(width=36), "ties": predictable_gpt(),
}  # fmt: skip
with torch.no_grad():
    MODELS["ties"].head.weight[VOCAB // 2 :] = MODELS["ties"].head.weight[: VOCAB // 2]


@pytest.fixture
def passes(monkeypatch) -> list[Window]:
    """Every pass of a window; the host looks after each."""
    monkeypatch.setattr(decoding, "_MOST_STEPS_AHEAD", 1)
    seen: list[Window] = []
    advance = Window.advance

    def counting(window: Window) -> None:
        seen.append(window)
        advance(window)

    monkeypatch.setattr(Window, "advance", counting)
    return seen


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_lookahead_changes_nothing_but_the_number_of_passes(place, data):
    draw = data.draw
    gpt, batch = MODELS[draw(st.sampled_from(sorted(MODELS)))], draw(st.integers(1, BATCH))
    engine = place.engine(gpt, slots=BATCH)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    given = torch.randint(VOCAB, (batch, LENGTH + 1), generator=generator)
    all_from = st.integers(1, LENGTH - 1).map(lambda first: list(range(first, LENGTH + 1)))
    steps = draw(all_from | st.sets(st.integers(1, LENGTH), min_size=1).map(sorted))
    options = dict(
        wanted=torch.rand(batch, len(steps), generator=generator) < draw(st.sampled_from([0.5, 1.0])),
        rows=[step // 8 for step in steps], columns=[step % 8 for step in steps],
        temperature=draw(st.sampled_from([0.2, 1.0, 3.0])), top_k=draw(st.sampled_from([None, 1, 5])),
        top_p=draw(st.sampled_from([None, 0.8])), greedy=draw(st.booleans()), seed=draw(st.integers(0, 99)),
        choices=draw(st.sampled_from([None, VOCAB // 2])),
    )  # fmt: skip
    slots = draw(st.permutations(range(BATCH)))[:batch]
    expected = decoded(engine, given, steps, lookahead=1, slots=slots, **options)
    lengths = [engine.length(slot) for slot in slots]
    assert torch.equal(
        decoded(engine, given, steps, lookahead=draw(st.integers(2, 25)), slots=slots, **options), expected
    )
    assert [engine.length(slot) for slot in slots] >= lengths


def test_right_guesses_save_passes(place, passes):
    """Each sequence moves on by itself: three take as many passes as the slowest of them alone."""
    engine, steps = place.engine(MODELS["predictable"]), range(1, LENGTH + 1)
    given = torch.arange(BATCH)[:, None].repeat(1, LENGTH + 1)

    def taken(which: slice, lookahead: int = 6) -> int:
        passes.clear()
        decoded(engine, given[which], steps, lookahead=lookahead, images=range(BATCH)[which], temperature=2.0)
        return len(passes)

    alone = [taken(slice(i, i + 1)) for i in range(BATCH)]
    assert min(alone) < LENGTH // 2 and max(alone) < LENGTH
    assert taken(slice(None)) == max(alone)
    assert taken(slice(None), 1) == 0, "a step for one token each is another one"


def test_known_tokens_are_right_guesses(place, passes):
    engine = place.engine(MODELS["random"])
    given, steps = torch.randint(VOCAB, (2, LENGTH + 1)), list(range(1, LENGTH + 1))
    wanted = torch.zeros(2, LENGTH, dtype=torch.bool)
    wanted[:, -1] = True
    expected = decoded(engine, given, steps, wanted=wanted, lookahead=1)
    assert torch.equal(decoded(engine, given, steps, wanted=wanted, lookahead=10), expected)
    assert len(passes) == 2


@pytest.mark.parametrize("lookahead", [1, 4, 12])
def test_progress_counts_known_tokens_and_shows_no_others(place, lookahead):
    engine, steps = place.engine(MODELS["predictable"]), list(range(3, LENGTH + 1))
    given = torch.randint(VOCAB, (BATCH, LENGTH + 1)).to(engine.device)
    sequences, seen = given.clone(), []
    made = request(sequences, steps, lookahead=lookahead, temperature=2.0)
    engine.decode(made, progress=lambda done: seen.append((done, sequences.clone())), every=2)
    assert [done for done, _ in seen] == list(range(2, len(steps) + 1, 2))
    for done, then in seen:
        assert torch.equal(then[:, : steps[done - 1] + 1], sequences[:, : steps[done - 1] + 1])
        assert torch.equal(then[then != given], sequences[then != given])


@pytest.mark.parametrize("late", [False, True])
def test_only_tokens_that_are_chosen_may_fail(place, late):
    """A guess that would give NaN is no error; the token that does is, and the slots are as they were."""
    gpt = predictable_gpt()
    engine = place.engine(gpt)
    given, options = torch.zeros(1, LENGTH + 1, dtype=torch.int64), dict(seed=3, temperature=2.0, top_k=20)
    expected = decoded(engine, given, range(1, LENGTH + 1), lookahead=1, **options)
    never = [token for token in range(VOCAB) if token not in expected]
    assert never
    with torch.no_grad():
        gpt.tok_emb.weight[never if not late else int(expected[0, 12])] = torch.nan
    engine = place.engine(gpt)
    if not late:
        assert torch.equal(decoded(engine, given, range(1, LENGTH + 1), lookahead=8, **options), expected)
        return
    for lookahead in (1, 8):
        with pytest.raises(ValueError, match="logits: got NaN"):
            decoded(engine, given, range(1, LENGTH + 1), lookahead=lookahead, **options)
        assert engine.length(0) == 0


@pytest.mark.parametrize("dtype", CudaEngine.DTYPES)
def test_windows_are_kept_by_their_shape_and_go_with_the_cache(place, dtype):
    engine = place.engine(MODELS["predictable"], dtype)
    given = torch.zeros(2, 12, dtype=torch.int64)
    for width in (4, 4, 7):
        tokens = decoded(engine, given, range(1, 12), lookahead=width, greedy=True)
        logits = engine.step([(i, 0, row[:-1]) for i, row in enumerate(tokens.tolist())], "all").view(2, 11, -1)
        assert (logits.argmax(-1).cpu() == tokens[:, 1:]).float().mean() >= (1.0 if dtype == "float32" else 0.9)
    assert sorted(engine._parts.windows) == [(2, 4), (2, 7)]
    engine.reserve(2, LENGTH)
    assert not engine._parts.windows
