"""Canvases: editing, and resumed runs that give the same result as uninterrupted ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import gpts
import pytest
import torch
from gpts import VOCAB, tiny_gpt, tokens
from safetensors.torch import save_file

from tamingfast.sampling import sample_grid
from tamingfast.sampling.canvas import Canvas, _Regularly, identity, keep_pixels, token_mask

SETTINGS = dict(window=4, schedule="paper", seed=3, top_k=20)


@pytest.fixture(scope="module")
def finished(gpt) -> Canvas:
    return Canvas.blank(tokens(2, 3), 7, 9, **SETTINGS).sample(gpt)


class Interrupted(KeyboardInterrupt):
    pass


def interrupt_after(calls: int):
    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        if calls <= 0:
            raise Interrupted

    return progress


def test_a_blank_canvas_is_a_sampled_grid(gpt, finished):
    assert finished.done
    assert torch.equal(finished.tokens, sample_grid(gpt, tokens(2, 3), 7, 9, **SETTINGS))
    assert torch.equal(Canvas.blank(tokens(2, 3), 7, 9, **SETTINGS).sample(gpt, batch=1).tokens, finished.tokens)


@pytest.mark.parametrize("schedule", ["paper", "scene", "strided", "block"])
@pytest.mark.parametrize("kind", ["prefix", "grid"])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_interrupted_canvas_ends_like_an_unbroken_one(gpt, tmp_path, monkeypatch, schedule, kind, batch):
    monkeypatch.setattr("time.monotonic", iter(range(10**6)).__next__)
    cond = tokens(2, 7, 9) if kind == "grid" else tokens(2, 3)
    blank = Canvas.blank(cond, 7, 9, **SETTINGS | {"schedule": schedule, "stride": 2})
    expected = blank.sample(gpt).tokens
    path = tmp_path / "run.canvas"
    seen = set()
    canvas = blank
    for _ in range(100):
        try:
            canvas = canvas.sample(gpt, path=path, batch=batch, progress=interrupt_after(5))
            break
        except Interrupted:
            canvas = Canvas.load(path)
            seen.add(int(canvas.pending.sum()))
    assert len(seen) > 3, "interrupted at several places"
    assert torch.equal(canvas.tokens, expected)


def test_save_and_load(finished, tmp_path):
    path = tmp_path / "a" / "x.canvas"
    finished.save(path)
    loaded = Canvas.load(path)
    for name in ("tokens", "pending", "cond"):
        assert torch.equal(getattr(loaded, name), getattr(finished, name))
    assert (loaded.settings, loaded.model) == (finished.settings, finished.model)
    assert loaded.model and list(path.parent.iterdir()) == [path]


def test_another_model_does_not_go_on(finished):
    other = tiny_gpt(seed=1)
    assert identity(other) != finished.model
    assert identity(tiny_gpt(n_unmasked=2)) != finished.model
    with pytest.raises(ValueError, match="model: got .* which began the canvas"):
        finished.sample(other)


def test_a_resampled_region_leaves_the_rest(gpt, finished):
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[2:5, 3:6] = True
    masked = finished.resample(mask)
    assert torch.equal(masked.sample(gpt).tokens, finished.tokens), "the same seed draws the same again"
    masked.settings["seed"] = 99
    again = masked.sample(gpt)
    assert torch.equal(again.tokens[:, ~mask], finished.tokens[:, ~mask])
    assert not torch.equal(again.tokens, finished.tokens)
    finished.settings["seed"] = SETTINGS["seed"]


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_outpainting_keeps_the_image(gpt, finished, side):
    grown = finished.outpaint(**{side: 3})
    added = {"left": (0, 3), "right": (0, 3), "top": (3, 0), "bottom": (3, 0)}[side]
    assert grown.tokens.shape == (2, 7 + added[0], 9 + added[1])
    assert int(grown.pending.sum()) == grown.tokens.numel() - finished.tokens.numel()
    after = grown.sample(gpt)
    assert torch.equal(after.tokens[~grown.pending], finished.tokens.flatten())
    assert len(after.tokens[grown.pending].unique()) > 3


def test_outpainting_to_the_right_is_the_larger_grid(gpt):
    """What a larger grid would have drawn at the right is drawn there, given the same left part in its own windows."""
    cond = tokens(1, 2)
    whole = Canvas.blank(cond, 5, 9, **SETTINGS).sample(gpt)
    left = Canvas.of(whole.tokens[:, :, :6], cond, **SETTINGS)
    assert torch.equal(left.outpaint(right=3).sample(gpt).tokens, whole.tokens)


def test_a_conditioning_grid_grows_along(gpt):
    cond = tokens(1, 7, 9)
    canvas = Canvas.of(tokens(1, 7, 6), cond[:, :, :6], **SETTINGS)
    with pytest.raises(ValueError, match="condition: got none, expected one of the larger canvas"):
        canvas.outpaint(right=3)
    assert canvas.outpaint(right=3, cond=cond).sample(gpt).done


def test_previews_and_saves_come_regularly(gpt, tmp_path):
    seen = []
    canvas = Canvas.blank(tokens(1, 3), 7, 9, **SETTINGS)
    canvas.sample(gpt, preview=lambda now: seen.append(int(now.pending.sum())), every=0.0)
    assert seen == sorted(seen, reverse=True) and len(seen) > 3
    clock = iter([0, 4, 5, 8, 30, 38, 39]).__next__
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", clock)
        regularly = _Regularly(5, lambda: calls.append(1))
        regularly.tick()  # at 4
        assert not calls
        regularly.tick()  # at 5, until 8: three seconds of work earn thirty of rest
        regularly.tick()  # at 30
        assert len(calls) == 1
        regularly.tick()  # at 38
        assert len(calls) == 2


def test_a_kept_photo_meets_the_drawn_tokens_in_a_soft_seam():
    resampled = torch.zeros(1, 6, 6, dtype=torch.bool)
    resampled[0, :, 3:] = True
    out = keep_pixels(torch.ones(1, 3, 24, 24), torch.zeros(1, 3, 24, 24), resampled)
    row = out[0, 0, 10]
    assert (row[12:] == 1).all() and (row[:8] == 0).all()
    assert (row[8:12].diff() > 0).all() and row[8] > 0 and row[11] < 1
    nothing = keep_pixels(torch.ones(1, 3, 24, 24), torch.zeros(1, 3, 24, 24), ~resampled & resampled)
    assert (nothing == 0).all()


def test_a_token_is_masked_when_any_of_its_pixels_is():
    pixels = torch.zeros(8, 12, dtype=torch.bool)
    pixels[0, 0] = pixels[7, 4] = True
    assert token_mask(pixels, 4).tolist() == [[True, False, False], [False, True, False]]
    with pytest.raises(ValueError, match="8x12 pixels, .* multiples of 16"):
        token_mask(pixels, 16)


def test_mistakes_are_named(finished, tmp_path):
    cases = {
        "condition: got 1 x 7 x 8 tokens": lambda: Canvas.blank(tokens(1, 7, 8), 7, 9),
        "mask: got 6 x 9 tokens, expected 7 x 9": lambda: finished.resample(torch.ones(6, 9, dtype=torch.bool)),
        "left: got -1": lambda: finished.outpaint(left=-1),
        "none.canvas: got no file, expected a saved canvas": lambda: Canvas.load(tmp_path / "none.canvas"),
        "settings: got 'shedule'": lambda: Canvas.blank(tokens(1, 2), 4, 4, shedule="paper"),
        "stride: got 5": lambda: Canvas.blank(tokens(1, 2), 9, 9, schedule="block", window=4, stride=5).sample(
            tiny_gpt()
        ),
    }
    for message, mistake in cases.items():
        with pytest.raises(ValueError, match=message):
            mistake()
    broken, other = tmp_path / "broken.canvas", tmp_path / "other.canvas"
    broken.write_bytes(b"no canvas")
    save_file({"a": torch.zeros(1)}, other)
    for path in (broken, other):
        with pytest.raises(ValueError, match="canvas: got a (damaged )?file .*expected"):
            Canvas.load(path)


SLOW = """
import sys, time, torch
from tamingfast.sampling.canvas import Canvas
sys.path.insert(0, sys.argv[1])
from gpts import tiny_gpt, tokens
torch.set_num_threads(1)
gpt = tiny_gpt()
gpt.head.register_forward_hook(lambda *call: time.sleep(0.03))
Canvas.blank(tokens(2, 3), 20, 24, **{settings}).sample(gpt, path=sys.argv[2], every=0.02, engine="torch")
"""


def test_a_killed_process_is_resumed(gpt, tmp_path):
    path = tmp_path / "run.canvas"
    script = SLOW.replace("{settings}", repr(SETTINGS))
    # In torch, where a hook can slow it down; it is resumed in whatever is the default here.
    environment = {**os.environ, "TAMINGFAST_BACKEND": "reference"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, os.path.dirname(gpts.__file__), str(path)], env=environment
    )
    begun = time.monotonic()
    while not path.exists() and time.monotonic() < begun + 60:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it was killed"
    canvas = Canvas.load(path)
    assert 0 < int(canvas.pending.sum()) < canvas.pending.numel()
    expected = sample_grid(gpt, tokens(2, 3), 20, 24, **SETTINGS)
    assert torch.equal(canvas.tokens[~canvas.pending], expected[~canvas.pending])
    assert torch.equal(canvas.sample(gpt).tokens, expected)
    assert expected.max() < VOCAB
