"""One optimizer step: which gradients it uses, how it averages and clips them, and its learning rate."""

from __future__ import annotations

import pytest
import tiny
import torch

from tamingfast import UserError
from tamingfast.training.settings import Training
from tamingfast.training.step import learning_rate, rate_factor


def test_each_optimizer_leaves_no_gradient_to_the_other():
    stage = tiny.vqgan_stage()
    left = []

    def check(loss, norm, values):
        left.append({name.split(".")[0] for name, p in stage.model.named_parameters() if p.grad is not None})

    tiny.move(stage, [tiny.images()], check=check)
    assert "loss" not in left[0] and left[1] == {"loss"}
    assert all(parameter.requires_grad for parameter in stage.model.parameters())


def test_accumulation_equals_the_large_batch():
    whole, halves = tiny.vqgan_stage({"disc_start": 5}), tiny.vqgan_stage({"disc_start": 5})
    for stage in (whole, halves):  # under Adam the first step would be the sign of what may be rounding noise
        stage.optimizers[0] = torch.optim.SGD(stage.model.autoencoder_parameters(), lr=0.1)
    batch = tiny.images(4)
    one, expected = tiny.move(whole, [batch])
    two, got = tiny.move(halves, [{"image": batch["image"][:2]}, {"image": batch["image"][2:]}])
    assert float(two["aeloss"]) == pytest.approx(float(one["aeloss"]), rel=1e-5)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=1e-4)


def test_clipping_bounds_the_gradient():
    stage, norms = tiny.vqgan_stage(), []
    stage.optimizers = [torch.optim.SGD(stage.model.autoencoder_parameters(), lr=1.0)]
    before = [p.detach().clone() for p in stage.model.autoencoder_parameters()]
    tiny.move(stage, [tiny.images()], grad_clip=1e-3, check=lambda loss, norm, values: norms.append(norm))
    moved = torch.stack(
        [(p.detach() - q).norm() for p, q in zip(stage.model.autoencoder_parameters(), before, strict=True)]
    ).norm()
    assert norms[0] > 1e-2 and float(moved) == pytest.approx(1e-3, rel=1e-2)


def test_learning_rate_rule():
    made = Training(steps=1, batch_size=12, accumulate=2)
    assert learning_rate(made, 4.5e-6, processes=4) == pytest.approx(2 * 4 * 12 * 4.5e-6)
    assert learning_rate(Training(steps=1, learning_rate=0.1), 4.5e-6, processes=4) == 0.1


def test_without_a_rate_or_a_base_there_is_no_rule():
    with pytest.raises(UserError, match="model.base_learning_rate: got None, expected a number above 0"):
        learning_rate(Training(), None, processes=1)


def test_a_schedule_warms_up_and_decays():
    assert [rate_factor(Training(), step) for step in (0, 9)] == [1.0, 1.0]
    warm = Training(warmup_steps=4, decay_steps=8)
    assert [rate_factor(warm, step) for step in (0, 4, 8, 20)] == pytest.approx([0.25, 0.5, 0.0, 0.0])
