"""Requests to engines: both engines report each mistake in the same words, and a refused request changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_cases import BATCHES, HostEngine, cpu_engine, request
from gpts import random_gpt
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamingfast.engines import DecodeRequest, Engine, GPTEngine, Span
from tamingfast.engines.request import Room, spans_of
from tamingfast.ops import backends
from tamingfast.ops.choice import Choice

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(backends.native()[0] is None, reason=backends.native()[1])


def cuda_engine(gpt) -> HostEngine:
    made = HostEngine(gpt)
    made.reserve(3, gpt.block_size)
    return made


@pytest.fixture(params=[pytest.param(cpu_engine, marks=needs_native), cuda_engine], ids=["cpu", "cuda"])
def make(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Makes an engine of three slots."""
    return request.param


# --- mistakes: the engines' sentences -------------------------------------------------------------

STEPS = {
    "slot below": ([(-1, 0, [1])], "slot: got -1, expected 0 to 2"),
    "slot above": ([(3, 0, [1])], "slot: got 3, expected 0 to 2"),
    "slot twice": ([(1, 0, [1]), (1, 0, [1])], "slot: got 1 twice, expected every slot at most once in a step"),
    "start below": ([(0, -1, [1])], "start: got -1, expected 0 to 0, the length of slot 0"),
    "start past the end": ([(2, 10, [1])], "start: got 10, expected 0 to 9, the length of slot 2"),
    "token below": ([(0, 0, [1, -1])], "token: got -1, expected 0 to 23"),
    "token above": ([(0, 0, [24])], "token: got 24, expected 0 to 23"),
    "token of another type": ([(0, 0, [1.5])], "token: got 1.5, expected an integer"),
    "no tokens": ([(0, 0, [])], "tokens: got 0 for slot 0, expected at least one"),
    "past the cache": (
        [(0, 0, [1] * 41)], "position: got 40, expected at most 39, the cache's last; reserve longer slots"
    ),
    "inside the prefix": (
        [(2, 3, [1])],
        "start: got 3, expected 0, or 5 or more; positions of the unmasked prefix attend to each other, so feed them "
        "in one piece",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("items", "message"), STEPS.values(), ids=STEPS)
def test_bad_steps_are_named_and_change_nothing(make, items, message):
    engine = make(random_gpt(n_unmasked=5))
    engine.step([(2, 0, [1] * 9)])
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole sentence is compared
        engine.step(items)
    assert str(error.value) == message
    assert [engine.length(i) for i in range(3)] == [0, 0, 9]


def test_bad_feeds_are_named(make):
    engine = make(random_gpt())
    with pytest.raises(ValueError, match=r"^tokens: got torch.int64 \(3,\), expected int64 \(2,\)"):
        engine.feed(torch.zeros(3, dtype=torch.int64), [Span(0, 0, 2)])
    with pytest.raises(ValueError, match=r"^tokens: got torch.int32 \(2,\), expected int64 \(2,\)"):
        engine.feed(torch.zeros(2, dtype=torch.int32), [Span(0, 0, 2)])
    with pytest.raises(ValueError, match="^logits: got 'some', expected one of none, last, all"):
        engine.step([(0, 0, [1])], "some")
    assert engine.step([]).shape == (0, 24)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


DECODINGS = {
    "slot": (dict(slots=[3]), "slot: got 3, expected 0 to 2"),
    "slot twice": (dict(slots=[1, 1], sequences=zeros(2, 9)), "slot: got [1, 1], expected every slot at most once"),
    "slots": (dict(slots=[0, 1]), "slots: got 2, expected one for each of 1 sequences"),
    "sequences": (
        dict(sequences=torch.zeros(1, 9)), "sequences: got torch.float32 (1, 9), expected contiguous int64 (B, L)"
    ),
    "layout": (
        dict(sequences=zeros(9, 2).t()[:1]),
        "sequences: got non-contiguous torch.int64 (1, 9), expected contiguous int64 (B, L)",
    ),
    "step below": (dict(steps=[0, 1]), "steps: got 0, expected 1 to 8"),
    "step above": (dict(steps=[3, 9]), "steps: got 9, expected 1 to 8"),
    "falling": (dict(steps=[4, 3]), "steps: got 3 after 4, expected increasing steps"),
    "step twice": (dict(steps=[3, 3]), "steps: got 3 after 3, expected increasing steps"),
    "a step of another type": (dict(steps=[3, 4.5]), "steps: got 4.5, expected an integer"),
    "past the cache": (
        dict(steps=[3, 42], sequences=zeros(1, 50)),
        "steps: got 42, expected at most 40, one more than the cache's last position; reserve longer slots",
    ),
    "wanted": (dict(wanted=torch.ones(1, 3)), "wanted: got shape (1, 3), expected (1, 2)"),
    "rows": (dict(rows=[1]), "rows: got 1 values, expected 2"),
    "row": (dict(rows=[2**32, 0]), "rows: got 4294967296, expected 0 to 4294967295"),
    "column": (dict(columns=[1, -1]), "columns: got -1, expected 0 to 4294967295"),
    "images": (dict(images=[1, 2]), "images: got 2 values, expected 1"),
    "image": (dict(images=[2**32]), "images: got 4294967296, expected 0 to 4294967295"),
    "fed": (dict(fed=4), "fed: got 4, expected at most 0, the length of slot 0"),
    "fed below": (dict(fed=-1), "fed: got -1, expected 0 or more"),
    "choices": (dict(choices=25), "choices: got 25, expected 1 to 24"),
    "no choices": (dict(choices=0), "choices: got 0, expected 1 to 24"),
    "temperature": (
        dict(temperature=0.0),
        "temperature: got 0.0, expected 1.2e-38 to 3.4e+38; for 0 use greedy",
    ),
    "top_k": (dict(top_k=0), "top_k: got 0, expected an integer of at least 1, or None to keep all tokens"),
    "top_p": (
        dict(top_p=1.5), "top_p: got 1.5, expected a number above 0 and at most 1, or None to keep all tokens"
    ),
    "seed": (dict(seed=-1), "seed: got -1, expected an integer from 0 to 2**64 - 1"),
    "token": (dict(sequences=torch.full((1, 9), 24)), "token: got 24, expected 0 to 23"),
    "token below": (dict(sequences=torch.full((1, 9), -1)), "token: got -1, expected 0 to 23"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DECODINGS.values(), ids=DECODINGS)
def test_bad_decodings_are_named_and_change_nothing(make, change, message):
    engine = make(random_gpt())
    arguments = dict(slots=[0], sequences=zeros(1, 9), steps=[3, 4]) | change
    before = arguments["sequences"].clone()
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole sentence is compared
        engine.decode(request(**arguments))
    assert str(error.value) == message
    assert engine.length(0) == 0 and torch.equal(arguments["sequences"], before)


def test_other_bad_arguments_are_named(make):
    engine = make(random_gpt())
    engine.step([(0, 0, [1, 2])])
    for use, message in (
        (lambda: engine.decode(request(zeros(1, 9), [3]), every=0), "every: got 0, expected 1 or more"),
        (lambda: engine.reserve(0, 5), "slots: got 0, expected 1 to 16777216"),
        (lambda: engine.reserve(1, 0), "length: got 0, expected 1 to 40"),
        (lambda: engine.reserve(1, 41), "length: got 41, expected 1 to 40"),
        (lambda: engine.length(3), "slot: got 3, expected 0 to 2"),
        (lambda: engine.truncate(-1, 0), "slot: got -1, expected 0 to 2"),
        (lambda: engine.truncate(0, 3), "length: got 3, expected 0 to 2"),
        (lambda: engine.copy(3, 0), "source: got 3, expected 0 to 2"),
        (lambda: engine.copy(0, 3), "target: got 3, expected 0 to 2"),
        (lambda: engine.copy(0, 1, 3), "length: got 3, expected 0 to 2"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011  the whole sentence is compared
            use()
        assert str(error.value) == message
    assert [engine.length(i) for i in range(3)] == [2, 0, 0]
    with pytest.raises(ValueError, match="^dtype: got 'float8', expected one of "):
        type(engine)(random_gpt(), "float8")


def test_slots_are_reserved_first(make):
    engine = type(make(random_gpt()))(random_gpt())
    with pytest.raises(ValueError, match=r"^slot: got 0, expected a slot of the cache; call reserve\(\) first"):
        engine.step([(0, 0, [1])])


def test_a_closed_engine_says_so(make):
    engine = make(random_gpt())
    engine.close()
    for use in (lambda: engine.step([(0, 0, [1])]), lambda: engine.length(0), lambda: engine.reserve(1, 1),
                lambda: engine.decode(request(zeros(1, 9), [3])), engine.info):  # fmt: skip
        with pytest.raises(ValueError, match="^the engine is closed"):
            use()


@pytest.mark.parametrize("batch", BATCHES)
def test_nothing_asked_for_is_nothing_done(make, batch):
    engine = make(random_gpt())
    engine.reserve(batch, 9)
    sequences = torch.full((batch, 5), 99)  # not looked at
    engine.decode(request(sequences, []))
    engine.decode(request(sequences[:0], [2]))
    assert sequences.unique().tolist() == [99] and engine.length(0) == 0


# --- the request itself ---------------------------------------------------------------------------


LENGTHS = (3, 5, 0, 12)
ROOM = Room(24, len(LENGTHS), 12, LENGTHS.__getitem__, n_unmasked=4)
word = st.integers(0, 2**32 - 1)


@st.composite
def good_requests(draw: st.DrawFn) -> dict:
    """Arguments of a request that fits `ROOM`, up to its limits."""
    slots = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
    length = draw(st.integers(2, 16))
    steps = sorted(draw(st.sets(st.integers(1, min(length - 1, 12)), min_size=1, max_size=4)))
    batch, count = len(slots), len(steps)
    wanted = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * count, max_size=batch * count)))
    sequences = torch.randint(24, (batch, length), generator=torch.Generator().manual_seed(draw(word)))
    sequences[:, steps] = sequences[:, steps].masked_fill(wanted.view(batch, count), draw(st.sampled_from([-5, 0, 99])))
    sequences[:, steps[-1] + 1 :] = 99  # neither is looked at
    return dict(
        slots=slots, sequences=sequences, steps=steps, wanted=wanted.view(batch, count),
        rows=draw(st.lists(word, min_size=count, max_size=count)),
        columns=draw(st.lists(word, min_size=count, max_size=count)),
        images=draw(st.lists(word, min_size=batch, max_size=batch)),
        fed=draw(st.integers(0, min(LENGTHS[slot] for slot in slots))), choices=draw(st.none() | st.integers(1, 24)),
    )  # fmt: skip


@given(good_requests())
def test_a_good_request_is_taken(arguments):
    DecodeRequest(**arguments).check_fits(ROOM, CPU)


def outside(draw: st.DrawFn, least: int, most: int) -> int:
    return draw(st.integers(most + 1, most + 9) | st.integers(least - 9, least - 1))


def steps_instead(steps: list[int], **others) -> dict:
    return dict(steps=steps, wanted=None, rows=None, columns=None) | others


def one_replaced(draw: st.DrawFn, values: list[int], value: int) -> list[int]:
    where = draw(st.integers(0, len(values) - 1))
    return [*values[:where], value, *values[where + 1 :]]


def bad_token(draw: st.DrawFn, good: dict) -> dict:
    """At a place whose token is given: before the last step, and not to be decoded."""
    given = torch.ones(len(good["slots"]), good["steps"][-1] + 1, dtype=torch.bool)
    given[:, good["steps"]] = ~good["wanted"]
    where = draw(st.sampled_from(given.nonzero().tolist()))
    sequences = good["sequences"].clone()
    sequences[tuple(where)] = outside(draw, 0, 23)
    return dict(sequences=sequences)


#: By the name that the message begins with: one change each that makes a good request a bad one.
MISTAKES = [
    ("slot", lambda draw, good: dict(slots=one_replaced(draw, good["slots"], outside(draw, 0, 3)))),
    ("slot", lambda draw, good: dict(slots=good["slots"] * 2, sequences=good["sequences"].repeat(2, 1), images=None,
                                     wanted=None)),
    ("slots", lambda draw, good: dict(slots=[*good["slots"], next(i for i in range(4) if i not in good["slots"])],
                                      wanted=None, images=None)),
    ("steps", lambda draw, good: steps_instead([good["steps"][0], *good["steps"]])),
    ("steps", lambda draw, good: steps_instead([*good["steps"], good["steps"][0]])),
    ("steps", lambda draw, good: steps_instead([-draw(st.integers(0, 3)), *good["steps"]])),
    ("steps", lambda draw, good: steps_instead([*good["steps"], good["sequences"].shape[1] + draw(st.integers(0, 3))])),
    ("steps", lambda draw, good: steps_instead([draw(st.integers(13, 19))],
                                               sequences=torch.zeros(len(good["slots"]), 20, dtype=torch.int64))),
    ("wanted", lambda draw, good: dict(wanted=good["wanted"][:, :-1])),
    ("rows", lambda draw, good: dict(rows=good["rows"][:-1])),
    ("rows", lambda draw, good: dict(rows=one_replaced(draw, good["rows"], outside(draw, 0, 2**32 - 1)))),
    ("columns", lambda draw, good: dict(columns=[*good["columns"], 0])),
    ("columns", lambda draw, good: dict(columns=one_replaced(draw, good["columns"], outside(draw, 0, 2**32 - 1)))),
    ("images", lambda draw, good: dict(images=good["images"][:-1])),
    ("images", lambda draw, good: dict(images=one_replaced(draw, good["images"], outside(draw, 0, 2**32 - 1)))),
    ("fed", lambda draw, good: dict(fed=outside(draw, 0, min(LENGTHS[slot] for slot in good["slots"])))),
    ("choices", lambda draw, good: dict(choices=outside(draw, 1, 24))),
    ("token", bad_token),
    ("sequences", lambda draw, good: dict(sequences=good["sequences"].int())),
    ("sequences", lambda draw, good: dict(sequences=good["sequences"].t().contiguous().t())),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(MISTAKES)), ids=[name for name, _ in MISTAKES])
@settings(max_examples=30)
@given(good=good_requests(), data=st.data())
def test_one_mistake_in_a_good_request_is_named(case, good, data):
    name, change = MISTAKES[case]
    changed = change(data.draw, good)
    if name == "sequences" and changed["sequences"].dtype == torch.int64:
        assume(not changed["sequences"].is_contiguous())  # a single row is, transposed or not
    with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
        DecodeRequest(**(good | changed)).check_fits(ROOM, CPU)


@st.composite
def good_spans(draw: st.DrawFn) -> list[Span]:
    """Spans that fit `ROOM`, up to its limits."""
    spans = []
    for slot in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)):
        start = draw(st.sampled_from([0, *range(4, min(LENGTHS[slot], 11) + 1)]))
        spans.append(Span(slot, start, draw(st.integers(1, 12 - start))))
    return spans


@given(good_spans())
def test_good_spans_are_taken(spans):
    ROOM.check_step(zeros(sum(span.count for span in spans)), spans, "last")


#: As `MISTAKES`, of one span.
SPAN_MISTAKES = [
    ("slot", lambda draw, span: Span(outside(draw, 0, 3), span.start, span.count)),
    ("tokens", lambda draw, span: Span(span.slot, span.start, 0)),
    ("start", lambda draw, span: Span(span.slot, outside(draw, 0, LENGTHS[span.slot]), 1)),
    ("position", lambda draw, span: Span(span.slot, span.start, 13 - span.start + draw(st.integers(0, 5)))),
    ("start", lambda draw, span: Span(1, draw(st.integers(1, 3)), 1)),  # inside the prefix
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(SPAN_MISTAKES)), ids=[name for name, _ in SPAN_MISTAKES])
@settings(max_examples=30)
@given(spans=good_spans(), data=st.data())
def test_one_mistake_in_good_spans_is_named(case, spans, data):
    name, change = SPAN_MISTAKES[case]
    where = data.draw(st.integers(0, len(spans) - 1))
    bad = change(data.draw, spans[where])
    spans = [*(span for i, span in enumerate(spans) if i != where and span.slot != bad.slot), bad]
    with pytest.raises(ValueError, match=f"^{name}: got .*, expected "):
        ROOM.check_step(zeros(sum(span.count for span in spans)), spans, "last")


@given(good_spans())
def test_a_slot_twice_in_a_step_is_named(spans):
    with pytest.raises(ValueError, match=f"^slot: got {spans[0].slot} twice, expected "):
        ROOM.check_step(zeros(sum(span.count for span in spans) + 1), [*spans, Span(spans[0].slot, 0, 1)], "last")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.lists(st.integers(0, 99), max_size=4)), max_size=4))
def test_items_are_spans_and_their_tokens(items):
    tokens, spans = spans_of(items)
    parts = tokens.split([span.count for span in spans])
    assert [(span.slot, span.start, part.tolist()) for span, part in zip(spans, parts, strict=True)] == items


def test_defaults_of_a_request():
    made = DecodeRequest(slots=torch.tensor([2, 0]), sequences=zeros(2, 9), steps=range(3, 6))
    assert made.slots == [2, 0] and made.steps == [3, 4, 5] and type(made.slots[0]) is int
    assert made.wanted.tolist() == [[True] * 3] * 2
    assert (made.rows, made.columns, made.images) == ([0, 0, 0], [3, 4, 5], [0, 1])
    assert (made.fed, made.choices, made.choice) == (0, None, Choice())


def test_a_request_stays_on_its_device():
    with pytest.raises(ValueError, match="^sequences: got a tensor on cpu, expected one on cuda:0"):
        request(zeros(1, 9), [3]).check_fits(ROOM, torch.device("cuda", 0))


@needs_native
def test_wrong_transformers_are_refused():
    with pytest.raises(RuntimeError, match="it runs on the CPU, and the transformer is on meta"):
        GPTEngine(random_gpt().to("meta"))
