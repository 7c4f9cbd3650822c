"""Whole models compile into one graph, and give what they give without compilation."""

from __future__ import annotations

import pytest
import torch
from networks import prior
from processes import run_python
from torch import nn
from torch.testing import assert_close

TARGET = "tamingfast.models.condition_stages"
CONDITIONS = {
    "unconditional": ("__is_unconditional__", {}, torch.zeros(2, 3, 8, 8)),
    "classes": ({"target": f"{TARGET}.Labelator", "params": {"n_classes": 5}}, {}, torch.tensor([3, 4])),
    "coordinates": (
        {"target": f"{TARGET}.CoordStage", "params": {"n_embed": 11, "down_factor": 2}},
        {"downsample_cond_size": 8},
        torch.linspace(0, 1, 512).view(2, 1, 16, 16),
    ),
    "images": ("__is_first_stage__", {}, torch.linspace(-1, 1, 384).view(2, 3, 8, 8)),
}


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_prior_with_its_stages(name):
    cond, options, c = CONDITIONS[name]
    model = prior(cond, block=40, **options).eval()
    x = torch.randn(2, 3, 8, 8)
    logits, target = compiled(model)(x, c)
    expected, tokens = model(x, c)
    assert torch.equal(target, tokens)
    assert_close(logits, expected)
    logits.sum().backward()


def test_a_prior_in_training_mode():
    model = prior(pkeep=0.5).train()
    x = torch.randn(2, 3, 8, 8)
    compiled(model)(x, x)[0].sum().backward()


@pytest.mark.parametrize("method", ["encode", "forward"])
def test_a_first_stage(method):
    model = prior().first_stage_model
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    found = torch.compile(getattr(model, method), fullgraph=True, backend="aot_eager")(x)
    assert_close(found[0], getattr(model, method)(x)[0])


def test_a_first_stage_under_autocast():
    model = prior().first_stage_model
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(model)(x)[0]
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


def test_a_label_outside_the_classes_is_still_refused_without_compilation():
    cond, options, _ = CONDITIONS["classes"]
    with pytest.raises(ValueError, match=r"class label: got 3 to 5, expected 0 to 4"):
        prior(cond, **options).encode_to_c(torch.tensor([3, 5]))


def test_the_compiler_is_not_imported_until_something_is_compiled():
    """It takes longer than all else of `import tamingfast`."""
    done = run_python(
        "import sys, tamingfast; tamingfast.load_model('demo'); assert 'torch._dynamo' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
