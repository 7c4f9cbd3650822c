"""Lookahead in the CPU engine: exactly the tokens of decoding one after the other, in fewer passes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from engine_cases import cpu_engine, decoded, request
from gpts import random_gpt
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python
from torch import Tensor

from tamingfast.engines import GPTEngine
from tamingfast.models.gpt import GPT
from tamingfast.ops import backends
from tamingfast.sampling.lookahead import SIZES, PassCost, Survival

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.build_info()["isas"] if native else []
VOCAB, LENGTH, BATCH = 24, 40, 3


def predictable_gpt(n_unmasked: int = 0, std: float = 0.1) -> GPT:
    """A transformer of which some tokens can be guessed from the token before, others not."""
    gpt = random_gpt(VOCAB, LENGTH, n_unmasked=n_unmasked, std=std)
    with torch.no_grad():
        gpt.head.weight.copy_(gpt.tok_emb.weight.roll(1, 0) * 20)
    return gpt


MODELS = {
    "predictable": predictable_gpt(),
    "random": random_gpt(VOCAB, LENGTH),
    "prefix": predictable_gpt(n_unmasked=5),
    "ties": predictable_gpt(),
    "some tokens are NaN": predictable_gpt(),
    "one late token is NaN": predictable_gpt(),
    "all is NaN": predictable_gpt(),
}
with torch.no_grad():
    MODELS["ties"].head.weight[VOCAB // 2 :] = MODELS["ties"].head.weight[: VOCAB // 2]
    MODELS["some tokens are NaN"].tok_emb.weight[20:] = torch.nan
    MODELS["one late token is NaN"].pos_emb[0, 23] = torch.nan
    MODELS["all is NaN"].head.weight[3] = torch.nan
ENGINES: dict[tuple[str, str, str, bool], GPTEngine] = {}


def engine_of(model: str, dtype: str, isa: str, drafts: bool = False) -> GPTEngine:
    key = (model, dtype, isa, drafts)
    if key not in ENGINES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TAMINGFAST_ISA", isa)
            ENGINES[key] = GPTEngine(MODELS[model], dtype, threads=1, drafts=drafts)
            ENGINES[key].reserve(BATCH, LENGTH)
    return ENGINES[key]


@dataclass
class Outcome:
    """What a caller sees of a call."""

    reported: list[int]
    error: str
    tokens: list[list[int]]  # of the steps that were reported
    logits: list[list[float]]  # of the last token that each slot holds, unless there was an error


def outcome(engine: GPTEngine, given: Tensor, steps: list[int], fed: int, **options) -> Outcome:
    """Decodes a copy of ``given``. Tokens that a callback sees must be final, those to come as they were given."""
    for slot in range(BATCH):
        engine.truncate(slot, 0)
    if fed:
        engine.step([(slot, 0, row[:fed]) for slot, row in enumerate(given.tolist())])
    sequences, seen, reported, error = given.clone(), [], [], ""

    def look(done: int) -> None:
        reported.append(done)
        seen.append(sequences.clone())

    try:
        engine.decode(request(sequences, steps, fed=fed, **options), progress=look)
    except ValueError as caught:
        error = str(caught)
    for count, before in enumerate(seen, 1):
        assert torch.equal(before[:, steps[:count]], sequences[:, steps[:count]])
        touched = before != given
        assert torch.equal(before[touched], sequences[touched]), "only final tokens are written"
    logits = []
    for slot, row in enumerate(sequences.tolist() if not error else []):
        last = engine.length(slot) - 1
        if last >= engine._n_unmasked:  # others are fed with the whole prefix
            logits += engine.step([(slot, last, row[last : last + 1])]).nan_to_num(7e7).tolist()
    return Outcome(reported, error, sequences[:, steps[: len(reported)]].tolist(), logits)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_lookahead_changes_nothing_but_the_number_of_passes(data):
    draw = data.draw
    engine = engine_of(
        draw(st.sampled_from(sorted(MODELS))), draw(st.sampled_from(GPTEngine.DTYPES)), draw(st.sampled_from(ISAS)),
        draw(st.booleans()),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    given = torch.randint(20, (BATCH, LENGTH + 1), generator=generator)
    all_from = st.integers(1, 39).map(lambda first: list(range(first, LENGTH + 1)))
    steps = draw(all_from | st.sets(st.integers(1, LENGTH), min_size=1).map(sorted))
    width = draw(st.sampled_from([LENGTH + 1, 8]))
    options = dict(
        fed=steps[0] if steps[0] >= max(engine._n_unmasked, 1) and draw(st.booleans()) else 0,
        wanted=torch.rand(BATCH, len(steps), generator=generator) < draw(st.sampled_from([0.5, 0.9, 1.0])),
        rows=[step // width for step in steps], columns=[step % width for step in steps],
        temperature=draw(st.sampled_from([0.2, 1.0, 3.0])), top_k=draw(st.sampled_from([None, 1, 5])),
        top_p=draw(st.sampled_from([None, 0.8])), greedy=draw(st.booleans()), seed=draw(st.integers(0, 99)),
        choices=draw(st.sampled_from([None, VOCAB // 2])),
    )  # fmt: skip
    expected = outcome(engine, given, steps, lookahead=1, **options)
    for lookahead in (draw(st.integers(2, 8)), draw(st.integers(9, 50)), None):
        assert outcome(engine, given, steps, lookahead=lookahead, **options) == expected


@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_right_guesses_save_passes(dtype):
    """Each sequence moves on by itself: three take as many passes as the slowest of them alone."""
    engine, steps = engine_of("predictable", dtype, "auto"), range(1, LENGTH + 1)
    given = torch.arange(BATCH)[:, None].repeat(1, LENGTH + 1)

    def passes(lookahead: int, which: slice = slice(None)) -> int:
        before = engine.info()
        part = given[which]
        decoded(engine, part, steps, lookahead=lookahead, images=range(BATCH)[which], temperature=2.0)
        after = engine.info()
        assert after["tokens"] - before["tokens"] == part.numel() - len(part)
        assert after["rows"] - before["rows"] >= part.numel() - len(part)
        return after["passes"] - before["passes"]

    assert passes(1) == LENGTH
    alone = [passes(8, slice(i, i + 1)) for i in range(BATCH)]
    assert len(set(alone)) > 1
    assert max(alone) < LENGTH * 3 // 4
    assert passes(8) == max(alone)
    assert passes(LENGTH) < max(alone)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_copy_of_the_model_guesses_nearly_everything(dtype):
    """Its tokens differ rarely, and never if it has the same weights: then a pass chooses as many as it can."""
    engine = engine_of("predictable", dtype, "auto", drafts=True)
    given, steps = torch.arange(BATCH)[:, None].repeat(1, LENGTH + 1), range(1, LENGTH + 1)
    expected = decoded(engine, given, steps, lookahead=1, temperature=2.0)
    before = engine.info()["passes"]
    assert torch.equal(decoded(engine, given, steps, lookahead=9, temperature=2.0), expected)
    passes = engine.info()["passes"] - before
    fewest = 1 + -(-(LENGTH - 1) // 9)
    assert passes == fewest if dtype == "int8" else fewest <= passes < LENGTH // 3


def test_drafts_cost_what_info_says():
    without, drafts = (GPTEngine(MODELS["random"], drafts=drafts) for drafts in (False, True))
    assert without.info()["draft_bytes"] == 0
    weights = GPTEngine(MODELS["random"], "int8").info()["weight_bytes"]
    assert drafts.info()["draft_bytes"] == weights
    drafts.reserve(2, LENGTH)
    assert drafts.info()["draft_bytes"] > weights


def test_greedy_repetition_is_guessed_at_once():
    """A model that always says the same, however it came there, is right after the first logits."""
    gpt = random_gpt(VOCAB, LENGTH)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.zero_()
        gpt.ln_f.bias.fill_(1)
        gpt.head.weight[5] = 1
    engine = cpu_engine(gpt)
    tokens = decoded(engine, torch.zeros(1, LENGTH + 1, dtype=torch.int64), range(1, LENGTH + 1), lookahead=LENGTH,
                     greedy=True)  # fmt: skip
    assert tokens[0, 1:].tolist() == [5] * LENGTH
    assert engine.info()["passes"] == 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", GPTEngine.DTYPES)
def test_a_token_does_not_see_later_ones_not_even_nan(dtype, isa, monkeypatch):
    """Neither those of the same piece nor stale keys and values behind it."""
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    gpt = random_gpt(VOCAB, LENGTH, std=0.2)
    with torch.no_grad():
        gpt.tok_emb.weight[20:] = torch.nan
    tokens = torch.randint(20, (LENGTH,)).tolist()
    engine = cpu_engine(gpt, dtype)
    expected = engine.step([(0, 0, tokens)], "all")
    assert expected.isfinite().all()
    for known in range(1, LENGTH - 1):
        guessed = engine.step([(1, 0, [*tokens[:known], *[20] * (LENGTH - known)])], "all")
        assert torch.equal(guessed[:known], expected[:known])
        assert guessed[known:].isnan().all()
        assert torch.equal(engine.step([(1, known, tokens[known : known + 1])])[0], expected[known])


def test_an_interrupt_in_mid_window_leaves_what_is_known():
    """Ctrl-C from a timer while C++ decodes; what it left is continued to the tokens of an undisturbed call."""
    result = run_python(
        """
        import signal, torch
        from tamingfast.models.gpt import GPT
        from tamingfast.engines import DecodeRequest, GPTEngine
        torch.manual_seed(0)
        gpt = GPT(64, 600, n_layer=6, n_head=4, n_embd=256)
        engine = GPTEngine(gpt, threads=1)
        engine.reserve(2, 600)
        signal.signal(signal.SIGALRM, signal.default_int_handler)

        def decode(sequences, first, lookahead, fed=0):
            engine.decode(DecodeRequest(slots=range(2), sequences=sequences, steps=range(first, 601), fed=fed,
                                        lookahead=lookahead))

        sequences = torch.full((2, 601), 63)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            decode(sequences, 1, 8)
            print("finished")
        except KeyboardInterrupt:
            print("stopped")
        known = min(engine.length(0), engine.length(1))
        print(0 < known < 600)
        decode(sequences, known + 1, 8, fed=known)
        expected = torch.full((2, 601), 63)
        decode(expected, 1, 1)
        print(torch.equal(sequences, expected))
        """
    )
    assert result.stdout.split("\n") == ["stopped", "True", "True", ""], result.stderr


@pytest.mark.parametrize("held", [0, 7, LENGTH - 1])
def test_measuring_passes_leaves_the_cache_as_it_was(held):
    tokens = torch.arange(LENGTH).remainder(VOCAB).tolist()

    def last_logits(measured: bool) -> Tensor:
        engine = GPTEngine(MODELS["random"], threads=1)
        engine.reserve(2, LENGTH)
        if held:
            engine.step([(0, 0, tokens[:held])], "none")
        if measured:
            assert all(seconds > 0 for seconds in engine.pass_seconds(SIZES))
        assert engine.length(0) == held
        return engine.step([(0, held, tokens[held:])], "all")

    assert torch.equal(last_logits(measured=True), last_logits(measured=False))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_go_where_they_promise_most(data):
    """The best of all ways to share them, by the rules as Python has them."""
    draw, seconds = data.draw, st.floats(0.5, 4)
    costs = sorted(draw(st.lists(seconds, min_size=len(SIZES), max_size=len(SIZES))))
    extra, known = draw(st.sampled_from([0.0, 0.02, 0.5])), draw(st.integers(2, 40))
    passes = st.integers(0, 6).flatmap(lambda guesses: st.tuples(st.integers(0, guesses), st.just(guesses)))
    seen = draw(st.lists(st.lists(passes, max_size=30), min_size=2, max_size=2))
    most = draw(st.lists(st.integers(1, 5), min_size=2, max_size=2))
    rows, shares = native.share_rows(costs, extra, known, seen, most)

    learned = [Survival(), Survival()]
    for survival, own in zip(learned, seen, strict=True):
        for right, guesses in own:
            survival.observe([1.0] * (right + 1) + [0.0] * (guesses - right))
    for survival, share in zip(learned, shares, strict=True):
        assert share == pytest.approx(survival.share, rel=1e-9)

    def rate(first: int, second: int) -> float:
        tokens = sum(survival.share[:n].sum() for survival, n in zip(learned, (first, second), strict=True))
        added = first + second - 2
        return tokens / (PassCost(costs)(known + added) + extra * added)

    best = max(rate(a, b) for a in range(1, most[0] + 1) for b in range(1, most[1] + 1))
    assert rate(*rows) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("lookahead", [0, -1, 1025, 2.5, True, "8"])
def test_a_bad_lookahead_is_named(lookahead):
    with pytest.raises(ValueError, match=r"^lookahead: got .*, expected an integer from 1 to 1024, or None"):
        request(torch.zeros(1, 9, dtype=torch.int64), [3], lookahead=lookahead)
