"""Painting step by step, what a model can be asked for, and tokens as colours."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import images, load_model, tasks
from tamingfast.errors import UserError
from tamingfast.tasks.sheets import STEPS


@pytest.fixture(scope="module")
def prior(runs):
    return load_model(runs / "prior", device="cpu")


@pytest.fixture
def photo():
    return tiny.photographs(1, 16)[0]


def left_half(side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[:, : side // 4] = True
    return mask


def test_what_is_kept_keeps_its_pixels_over_many_steps(prior, photo):
    sheet = tasks.Sheet.of(prior, photo)
    before = sheet.pixels.clone()
    for seed in range(3):
        sheet = sheet.redrawn(prior, left_half(16), options=tasks.DrawingOptions(seed=seed))
    far = slice(8, None)  # more than a token from what was redrawn
    assert torch.equal(sheet.pixels[..., far], before[..., far])
    assert not torch.equal(sheet.pixels[..., :4], before[..., :4])
    assert len(sheet.before) == 3 and sheet.canvas is not None and sheet.canvas.done


def test_steps_are_undone_one_by_one(prior, photo):
    first = tasks.Sheet.of(prior, photo)
    second = first.redrawn(prior, left_half(16))
    third = second.extended(prior, right=4, top=2)
    assert third.size == (18, 20)
    back = third.undone()
    assert torch.equal(back.pixels, second.pixels) and back.recipe == second.recipe
    assert torch.equal(back.undone().pixels, first.pixels)
    assert back.undone().undone().size == (16, 16)  # nothing before that


def test_only_so_many_steps_are_kept(prior, photo):
    sheet = tasks.Sheet.of(prior, photo)
    for _ in range(STEPS + 3):
        sheet = sheet.painted(np.zeros((16, 16, 4), np.uint8))
    assert len(sheet.before) == STEPS and all(not each.before for each in sheet.before)


def test_paint_covers_as_much_as_it_says(prior, photo):
    strokes = np.zeros((16, 16, 4), np.uint8)
    strokes[:4] = (255, 0, 0, 255)
    strokes[4:8] = (255, 255, 255, 51)
    sheet = tasks.Sheet.of(prior, photo)
    painted = images.to_uint8(sheet.painted(strokes).pixels[0])
    assert (painted[:4] == (255, 0, 0)).all()
    assert np.abs(painted[4:8].astype(int) - (photo[4:8] * 0.8 + 51)).max() <= 1
    assert (painted[8:] == photo[8:]).all()
    with pytest.raises(UserError, match=r"^strokes: got uint8 of shape \(8, 8, 4\), expected uint8 \(16, 16, 4\)"):
        sheet.painted(strokes[:8, :8])


def test_sheets_of_files(prior, photo, tmp_path):
    Image.fromarray(photo).resize((33, 17)).save(tmp_path / "p.png")
    assert tasks.Sheet.of(prior, tmp_path / "p.png").size == (16, 32)
    assert tasks.Sheet.of(prior, tmp_path / "p.png", 16).size == (8, 16)
    drawn = tasks.Sheet.of(prior, photo).redrawn(prior, left_half(16))
    drawn.canvas.save(tmp_path / "p.canvas")
    drawn.save(tmp_path / "out.png")
    assert tasks.recipe_of(tmp_path / "out.png").task == "edit"
    again = tasks.Sheet.of(prior, tmp_path / "p.canvas")
    assert again.size == (16, 16) and torch.equal(again.canvas.tokens, drawn.canvas.tokens)
    with pytest.raises(UserError, match=r"^side: got 1x1 pixels, expected at least 2x2"):
        tasks.Sheet.of(prior, photo, 1)
    tasks.sample(prior, 2).canvas.save(tmp_path / "two.canvas")
    with pytest.raises(UserError, match="got 2 images, expected a canvas of one"):
        tasks.Sheet.of(prior, tmp_path / "two.canvas")


def test_pixels_belong_to_a_canvas_of_their_size(prior, photo):
    canvas = tasks.edit(prior, photo, left_half(16)).canvas
    with pytest.raises(UserError, match=r"^pixels: got 8x8 pixels, expected 16x16, the size of the canvas"):
        tasks.edit(prior, canvas, left_half(16), pixels=photo[:8, :8])
    with pytest.raises(UserError, match=r"^pixels: got some beside a photo"):
        tasks.edit(prior, photo, left_half(16), pixels=photo)
    kept = tasks.edit(prior, canvas, left_half(16), pixels=photo)
    assert (images.to_uint8(kept.images[0])[:, 8:] == photo[:, 8:]).all()
    assert "pixels" in kept.recipe.inputs


def test_abilities(runs, prior):
    can = tasks.abilities_of(prior)
    assert (can.factor, can.size, can.fixed) == (2, (8, 8), False)
    assert can.no_drawing is None and can.no_editing is None and can.condition is None and can.scales == ()
    assert can == tasks.abilities_of(tasks.Unread(runs / "prior").outline)
    stage = tasks.abilities_of(load_model(runs / "vqgan", device="cpu"))
    assert "cannot draw images" in stage.no_drawing and stage.no_editing is not None


def test_tokens_as_colours(prior, photo):
    found = tasks.reconstruct(prior, photo)
    (tokens,) = found.tokens
    assert tokens.shape == (8, 8) and len(tokens.unique()) == found.codes
    (colors,) = tasks.token_pictures(prior, [tokens])
    assert colors.shape == (3, 8, 8) and float(colors.abs().max()) <= 1
    flat = colors.flatten(1).T
    for code in tokens.unique():  # one colour for each code, and only for it
        own = flat[tokens.flatten() == code]
        assert torch.equal(own, own[:1].expand_as(own))
    assert len(flat.unique(dim=0)) == found.codes
    first, second = tasks.token_pictures(prior, [tokens[:4], tokens[4:]])
    assert torch.equal(torch.cat([first, second], 1), colors)
