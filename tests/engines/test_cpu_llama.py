"""The CPU engine on LlamaGPT: the logits of torch with all weight types, lookahead, guidance, every instruction set."""

from __future__ import annotations

import copy

import llamagen
import pytest
import torch
from engine_cases import HostEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tamingfast.engines import CudaEngine, DecodeRequest, GPTEngine
from tamingfast.engines.request import Second
from tamingfast.models.llama_gpt import LlamaGPT
from tamingfast.ops import backends
from tamingfast.ops.choice import Choice
from tamingfast.sampling import sample_grid
from tamingfast.sampling.schedule import RULES

native, reason = backends.native()
pytestmark = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.build_info()["isas"] if native else []
#: By their heads and widths: odd ones, and such as fill vectors.
MODELS = {(heads, width, hidden): llamagen.tiny_llama(5, heads, width, hidden) for heads, width, hidden in
          ((2, 24, 64), (1, 4, 32), (4, 64, 160), (3, 60, 96))}  # fmt: skip


def sequences(gpt: LlamaGPT, count: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(gpt.n_classes + 1, (count,), generator=generator)
    tokens = torch.randint(gpt.config.vocab_size, (count, gpt.block_size - 1), generator=generator)
    return torch.cat((gpt.class_tokens(labels), tokens), dim=1)


def in_int8(gpt: LlamaGPT) -> LlamaGPT:
    """A copy whose linear layers have the values that int8 weights stand for."""
    made = copy.deepcopy(gpt)
    for module in made.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    return made


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", MODELS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_logits(sizes, isa, dtype, monkeypatch):
    monkeypatch.setenv("TAMINGFAST_ISA", isa)
    gpt = MODELS[sizes]
    tokens = sequences(gpt)
    engine = GPTEngine(gpt, dtype, threads=2)
    engine.reserve(3, gpt.block_size)
    exact = in_int8(gpt) if dtype == "int8" else copy.deepcopy(gpt)
    with torch.no_grad():
        expected = exact.double()(tokens)[0].flatten(0, 1)
        rounded = exact.to(torch.float32 if dtype == "float32" else torch.bfloat16)(tokens)[0].flatten(0, 1)
    whole = engine.step([(slot, 0, row) for slot, row in enumerate(tokens.tolist())], "all")
    assert (whole - expected).square().mean() <= 4 * (rounded - expected).square().mean()
    pieces = [
        engine.step([(slot, start, row[start:stop]) for slot, row in enumerate(tokens.tolist())], "all")
        for start, stop in ((0, 1), (1, 2), (2, 17), (17, 25))
    ]
    joined = torch.cat([piece.view(3, -1, llamagen.CODES) for piece in pieces], 1).flatten(0, 1)
    assert torch.equal(joined, whole)


def test_weight_types_give_the_same_bits_on_every_instruction_set(monkeypatch):
    gpt = MODELS[4, 64, 160]
    for dtype in ("bfloat16", "int8"):
        found = []
        for isa in ISAS:
            monkeypatch.setenv("TAMINGFAST_ISA", isa)
            engine = GPTEngine(gpt, dtype, threads=1)
            engine.reserve(1, gpt.block_size)
            found.append(engine.step([(0, 0, sequences(gpt, 1)[0].tolist())], "all"))
        for other in found[1:]:
            assert torch.equal(other, found[0])


@pytest.mark.parametrize("drafts", [False, True])
def test_guidance_may_change_from_token_to_token(drafts):
    """LlamaGen's interval: scale 4 for the first tokens, then none."""
    from tamingfast import load_model

    found, gpt = llamagen.outputs(), load_model(llamagen.checkpoint())
    for lookahead in (1, 5, None):
        engine = GPTEngine(gpt, drafts=drafts)
        engine.reserve(6, 25)
        tokens = torch.zeros(3, 26, dtype=torch.int64)
        tokens[:, :1] = gpt.class_tokens(found["class_labels"])
        second = Second([3, 4, 5], gpt.config.vocab_size + gpt.n_classes, 1, [4.0] * 5 + [1.0] * 20)
        engine.decode(
            DecodeRequest(
                slots=range(3),
                sequences=tokens,
                steps=range(1, 26),
                choice=Choice(greedy=True),
                lookahead=lookahead,
                second=second,
            )
        )
        assert torch.equal(tokens[:, 1:], found["greedy_cfg_4.0_interval_3"])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_all_options_of_sampling(data):
    draw = data.draw
    gpt = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    model = llamagen.prior(gpt)
    cond = gpt.class_tokens(torch.tensor([0, 3]))
    rows, columns = draw(st.sampled_from([(5, 5), (3, 5), (7, 9)]))
    options = {
        "window": 5, "schedule": draw(st.sampled_from(RULES)), "stride": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 99)), "top_k": draw(st.sampled_from([None, 5])),
        "top_p": draw(st.sampled_from([None, 0.8])), "temperature": draw(st.sampled_from([0.5, 1.0])),
        "greedy": draw(st.booleans()), "cfg": draw(st.sampled_from([None, 2.0, "3:cosine"])),
    }  # fmt: skip
    expected = sample_grid(model, cond, rows, columns, engine="naive", **options)
    lookahead = draw(st.sampled_from([1, 3, 30, None]))
    for engine in ("torch", "native"):
        found = sample_grid(model, cond, rows, columns, engine=engine, lookahead=lookahead, **options)
        assert torch.equal(found, expected)


def test_classes_can_be_fed_but_not_chosen():
    gpt = MODELS[2, 24, 64]
    engine = GPTEngine(gpt)
    engine.reserve(1, 25)
    last = llamagen.CODES + llamagen.CLASSES
    engine.step([(0, 0, [last])])
    with pytest.raises(ValueError, match=f"^token: got {last + 1}, expected 0 to {last}"):
        engine.step([(0, 0, [last + 1])])
    with pytest.raises(ValueError, match=f"^choices: got {last}, expected 1 to {llamagen.CODES}"):
        engine.decode(DecodeRequest(slots=[0], sequences=torch.zeros(1, 3, dtype=torch.int64), steps=[1], choices=last))


def test_what_the_engines_refuse():
    assert GPTEngine.refusal(MODELS[2, 24, 64]) is None
    assert "multiple of 32" in str(GPTEngine.refusal(llamagen.tiny_llama(hidden=72)))
    assert "those of GPT2" in str(CudaEngine.refusal(MODELS[2, 24, 64])) or not backends.cuda().available
    assert HostEngine.refusal(MODELS[2, 24, 64]) is None


@pytest.mark.parametrize(("rows", "columns"), [(5, 4), (4, 4)])
def test_windows_of_another_width(rows, columns):
    gpt = MODELS[2, 24, 64]
    with pytest.raises(ValueError, match="^window: got .* expected up to 5 rows of 5"):
        sample_grid(llamagen.prior(gpt), gpt.class_tokens(torch.tensor([0])), rows, columns, window=5)
