"""The CUDA engine's logits against the torch reference: on a GPU, and with its kernels run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_cases import TOLERANCE, decoded
from golden import arrays, checkpoint
from gpts import all_logits, random_gpt

import tamingfast
from tamingfast.engines import CudaEngine, Span
from tamingfast.engines.cuda.rows import Group, Rows

SHAPES = {
    "tiny": dict(),
    "one head of 48, prefix": dict(vocab=50, heads=1, width=48, n_unmasked=7),
    "heads of 88": dict(vocab=40, heads=2, width=176, n_unmasked=40, std=0.1),
    "odd everything": dict(vocab=37, block=35, heads=3, width=33, n_unmasked=1),
    "one of each": dict(vocab=1, block=1, layers=1, heads=1, width=1),
    "no layers": dict(layers=0),
}


@pytest.mark.parametrize("dtype", CudaEngine.DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_of_any_geometry(place, shape, dtype):
    gpt = random_gpt(**shape)
    tokens = torch.randint(gpt.config.vocab_size, (gpt.block_size,)).tolist()
    expected = all_logits(gpt, tokens)
    logits = place.engine(gpt, dtype).step([(1, 0, tokens)], "all").cpu()
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    if dtype == "float32":
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["class", "unmasked"])
def test_logits_of_the_reference(place, name):
    data, model = arrays(f"net2net_{name}"), tamingfast.load_model(checkpoint(f"net2net_{name}"))
    prefix = data["c_indices"].shape[1]
    sequences = np.concatenate([data["c_indices"], data["z_indices"][:, :-1]], 1).tolist()
    logits = place.engine(model.transformer).step([(i, 0, sequence) for i, sequence in enumerate(sequences)], "all")
    logits = logits.cpu().view(2, len(sequences[0]), -1)[:, prefix - 1 :]
    np.testing.assert_allclose(logits.numpy(), data["logits"], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["class", "unmasked"])
def test_greedy_tokens_of_the_reference(place, name):
    data, model = arrays(f"net2net_{name}"), tamingfast.load_model(checkpoint(f"net2net_{name}"))
    known = torch.from_numpy(np.concatenate([data["c_indices"], data["greedy_indices"]], 1))
    count = known.shape[1] - 1 if place.device == "cuda" else data["c_indices"].shape[1] + 12
    sequences = known.clone()
    sequences[:, data["c_indices"].shape[1] :] = 0
    steps = range(data["c_indices"].shape[1], count)
    assert torch.equal(
        decoded(place.engine(model.transformer), sequences, steps, greedy=True)[:, :count], known[:, :count]
    )


@pytest.mark.parametrize("worth", [0, 20000, 10**9], ids=["tiles", "both", "rows"])
def test_a_ragged_step(place, worth, monkeypatch):
    """Prompts alone and together, continuations by one token and by many, of slots in any order."""
    monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", worth)
    gpt = random_gpt(n_unmasked=4, block=150)
    tokens = torch.randint(24, (6, 150)).tolist()
    made = place.engine(gpt, slots=6)
    made.step([(i, 0, tokens[i][:held]) for i, held in ((4, 130), (1, 5), (3, 9))], "none")
    spans = [(5, 0, 7), (0, 0, 7), (2, 0, 1), (4, 130, 1), (1, 5, 60), (3, 4, 100)]
    made.truncate(3, 4)
    spans[2] = (2, 0, 6)
    logits = made.step(
        [(slot, start, tokens[slot][start : start + count]) for slot, start, count in spans], "all"
    ).cpu()
    for (slot, start, count), part in zip(spans, logits.split([span[2] for span in spans]), strict=True):
        expected = all_logits(gpt, tokens[slot][: start + count])[start:]
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-4)
    assert [made.length(slot) for slot in range(6)] == [7, 65, 6, 104, 131, 7]
    flat = torch.tensor(tokens[0][7:9] + tokens[5][7:10], device=place.device)
    last = made.feed(flat, [Span(0, 7, 2), Span(5, 7, 3)]).cpu()
    for row, tokens_so_far in zip(last, (tokens[0][:9], tokens[5][:10]), strict=True):
        torch.testing.assert_close(row, all_logits(gpt, tokens_so_far)[-1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n_unmasked", [0, 3])
@pytest.mark.parametrize("dtype", CudaEngine.DTYPES)
def test_like_spans_behind_a_kept_prefix(place, dtype, n_unmasked, monkeypatch):
    """Tiles and rows see the same; the window's conditioning is fed once, what it is moved over again and again."""
    gpt = random_gpt(n_unmasked=n_unmasked, heads=3, width=33)
    tokens = torch.randint(24, (3, 30))
    expected = torch.stack([all_logits(gpt, row)[-1] for row in tokens.tolist()])
    for worth in (0, 1 << 40):
        monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", worth)
        made = place.engine(gpt, dtype)
        made.step([(i, 0, [7, 7, *row[2:4]]) for i, row in enumerate(tokens.tolist())], "none")
        for start in (0, 4):
            made.step([(2 - i, start, row[start:]) for i, row in enumerate(tokens.tolist())], "none")
        logits = made.step([(2 - i, 3, row[3:]) for i, row in enumerate(tokens.tolist())]).cpu()
        assert (logits - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_how_rows_are_grouped(monkeypatch):
    """Like spans that are many go in tiles, all others next to one another in one launch."""
    spans = [Span(0, 0, 10), Span(1, 0, 10), Span(2, 5, 20), Span(3, 0, 1), Span(4, 90, 10), Span(5, 0, 30)]
    monkeypatch.setattr("tamingfast.engines.cuda.rows._WORTH_TILES", 100 * 100)
    rows = Rows(spans, 0, 100, torch.device("cpu"))
    assert rows.groups == [Group(0, 20, 2, 0, 10), Group(20, 40, 1, 5, 20), Group(40, 51), Group(51, 81, 1, 0, 30)]
    assert rows.last_of(spans, [1] * 6).tolist() == [9, 19, 39, 40, 50, 80]
    assert rows.last_of(spans, [0, 2, 1, 0, 3, 0]).tolist() == [18, 19, 39, 48, 49, 50]
    assert rows.longest == 100
    assert Rows(spans, 0, 10, torch.device("cpu")).groups == [Group(0, 81)]
    assert Rows(spans[:1], 10, 200, torch.device("cpu")).groups == [Group(0, 10, 1, 0, 10)], "10 rows see 10 positions"


def test_more_tokens_than_one_pass_takes(place, monkeypatch):
    monkeypatch.setattr("tamingfast.engines.cuda.passes._TOKENS_PER_PASS", 50)
    gpt = random_gpt(n_unmasked=3)
    tokens = torch.randint(24, (3, 40))
    made = place.engine(gpt)
    logits = made.step([(i, 0, row) for i, row in enumerate(tokens.tolist())]).cpu()
    for row, sequence in zip(logits, tokens.tolist(), strict=True):
        torch.testing.assert_close(row, all_logits(gpt, sequence)[-1], rtol=1e-5, atol=1e-4)
    sequences = decoded(made, torch.nn.functional.pad(tokens, (0, 1)), [40], greedy=True)
    assert sequences[:, 40].tolist() == logits.argmax(-1).tolist()
