"""Public functions, given values of wrong types: one sentence about the argument, never an error from inside."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tiny
import torch
from networks import prior

from tamingfast import data, evaluation, images, load_model, tasks
from tamingfast.sampling import sample_grid

OTHER = (None, "x", 1.5, [1], {}, object(), b"x", True, float("nan"), np.float64(2.0), torch.tensor(1.5), 2**70)
FORM = re.compile(r"^[^\n]+?: got [^\n]+, expected [^\n]+$")
COND = torch.zeros(1, 1, dtype=torch.int64)
PIXELS = tiny.photographs(1, 8)[0]


@pytest.fixture(scope="module")
def model():
    return prior().eval()


#: name -> (call with a model and a value, values that are right)
CALLS = {
    "load_model": (lambda m, x: load_model(x), ("x",)),
    "inspect": (lambda m, x: tasks.inspect(x), ("x",)),
    "a task's model": (lambda m, x: tasks.sample(x, 1), ("x",)),
    "count": (lambda m, x: tasks.sample(m, x), (None,)),
    "options": (lambda m, x: tasks.sample(m, 1, options=x), (None,)),
    "canvas": (lambda m, x: tasks.sample(m, 1, canvas=x), (None, "x")),
    "batch": (lambda m, x: tasks.DrawingOptions(batch=x), ()),
    "data to encode": (lambda m, x: tasks.encode(m, x, "t.safetensors"), (None, {})),
    "settings of data": (lambda m, x: data.build(x), ({},)),
    "features": (lambda m, x: evaluation.evaluate_model(m, features=x), (None,)),
    "samples": (lambda m, x: evaluation.evaluate_model(m, samples=x), ()),
    "latents": (lambda m, x: m.first_stage_model.decode(x), ()),
    "tokens": (lambda m, x: m.first_stage_model.decode_code(x), ()),
    "a grid": (lambda m, x: m.decode_grid(x), ()),
    "rows": (lambda m, x: sample_grid(m, COND, x, 2), ()),
    "cond": (lambda m, x: sample_grid(m, x, 2, 2), ()),
    "start": (lambda m, x: sample_grid(m, COND, 2, 2, start=x), (None,)),
    "mask": (lambda m, x: sample_grid(m, COND, 2, 2, start=torch.zeros(1, 2, 2).long(), mask=x), (None,)),
    "what draws": (lambda m, x: sample_grid(x, COND, 2, 2), ()),
    "a sequence": (lambda m, x: m.transformer(x), ()),
    "targets": (lambda m, x: m.transformer(COND, targets=x), (None,)),
    "pixels": (lambda m, x: images.save_png("p.png", x), ()),
    "a place": (lambda m, x: images.save_png(x, PIXELS), ("x",)),
    "images": (lambda m, x: images.to_uint8(x), ()),
    "a sheet": (lambda m, x: images.save_grid("p.png", x), ()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_sentence_says_what_is_expected(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, right = CALLS[name]
    for value in OTHER:
        if any(value is each or (type(value) is type(each) and value == each) for each in right):
            continue
        with pytest.raises((ValueError, TypeError)) as raised:
            call(model, value)
        assert FORM.match(str(raised.value)), (value, raised.value)
    assert not list(tmp_path.iterdir())
