"""Drawings that are watched, stopped and refused for want of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamingfast import load_model, tasks
from tamingfast.errors import UserError
from tamingfast.tasks import drawing


@pytest.fixture(scope="module")
def prior(runs):
    return load_model(runs / "prior", device="cpu")


def stopping_after(times: int):
    calls = iter(range(10**9))
    return lambda: next(calls) >= times


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("size", [None, (16, 16)])
def test_a_stopped_drawing_is_the_beginning_of_the_whole_one(prior, engine, size):
    options = tasks.DrawingOptions(seed=3, engine=engine)
    whole = tasks.sample(prior, 2, size=size, options=options)
    part = tasks.sample(prior, 2, size=size, options=options, stop=stopping_after(2))
    drawn = ~part.canvas.pending
    assert 0 < int(drawn.sum()) < drawn.numel()
    assert torch.equal(part.canvas.tokens[drawn], whole.canvas.tokens[drawn])
    assert part.recipe is None and whole.recipe is not None
    gray = part.canvas.pending.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert bool((part.images.movedim(1, -1)[gray] == 0).all())
    again = tasks.sample(prior, 2, size=size, options=options)
    assert torch.equal(again.canvas.tokens, whole.canvas.tokens)  # the engine was left as it should be


def test_a_stopped_drawing_goes_on_from_its_file(prior, tmp_path):
    path, options = tmp_path / "a.canvas", tasks.DrawingOptions(seed=1)
    tasks.sample(prior, 3, options=options, canvas=path, stop=stopping_after(1))
    finished = tasks.sample(prior, canvas=path, resume=True)
    assert torch.equal(finished.canvas.tokens, tasks.sample(prior, 3, options=options).canvas.tokens)


def test_no_batch_is_begun_after_a_stop(prior):
    part = tasks.sample(prior, 4, options=tasks.DrawingOptions(batch=2), stop=lambda: True)
    assert bool(part.canvas.pending[2:].all()) and not bool(part.canvas.pending[:2].all())


def test_previews_come_as_often_as_is_asked(prior):
    seen: list[torch.Tensor] = []
    tasks.sample(prior, 1, preview=seen.append, every=0.0)
    assert seen and all(each.shape == (1, 3, 8, 8) for each in seen)
    rare: list[torch.Tensor] = []
    tasks.sample(prior, 1, preview=rare.append, every=3600)
    assert not rare


def test_edits_stop_too(prior):
    photo = np.full((8, 8, 3), 90, np.uint8)
    mask = np.ones((8, 8), bool)
    assert not tasks.edit(prior, photo, mask, stop=lambda: True).canvas.done
    assert not tasks.outpaint(prior, photo, right=4, bottom=4, stop=lambda: True).canvas.done


@pytest.mark.parametrize("wrong", [{"every": -1}, {"every": "often"}, {"every": float("nan")}, {"stop": True}])
def test_what_watches_is_checked(prior, wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: got"):
        tasks.sample(prior, 1, **wrong)


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_drawn(prior, monkeypatch):
    monkeypatch.setattr(drawing, "available_memory", lambda device: 36 * 8 * 8 * 3 - 1)
    drawn: list[torch.Tensor] = []
    with pytest.raises(UserError, match=r"^memory: got .* for 3 images of 8x8 pixels; draw fewer"):
        tasks.sample(prior, 3, preview=drawn.append, every=0.0)
    assert not drawn
    assert len(tasks.sample(prior, 2).images) == 2
