"""Departures from the original's adversarial loss: non-saturating, LeCam, a discriminator that learns earlier."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch
from torch.testing import assert_close

from tamingfast.models.losses import VQLPIPSWithDiscriminator

SMALL = {"disc_num_layers": 1, "disc_ndf": 4, "perceptual_weight": 0.0}


def loss_of(**options):
    torch.manual_seed(0)
    return VQLPIPSWithDiscriminator(**({"disc_start": 0} | SMALL | options))


def logits(loss, *images):
    return [loss.discriminator(x).detach().double() for x in images]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))


def test_non_saturating_by_formula(images):
    loss = loss_of(disc_loss="non_saturating").eval()
    x, y = images
    real, fake = (torch.sigmoid(each) for each in logits(loss, x, y))
    _, log = loss(torch.zeros(()), x, y, 0, 0)
    assert_close(log["train/g_loss"].double(), -torch.log(fake).mean())
    found, _ = loss(torch.zeros(()), x, y, 1, 0)
    assert_close(found.detach().double(), -0.5 * (torch.log(real).mean() + torch.log(1 - fake).mean()))


def test_lecam_by_formula(images):
    loss = loss_of(lecam_weight=0.3, lecam_decay=0.6).train()
    x, y = images
    plain = loss_of().train()
    averages = np.zeros(2)
    for _ in range(3):
        real, fake = logits(plain, x, y)  # of a discriminator with the same weights: batch norm moves no weight
        averages = 0.6 * averages + 0.4 * np.array([real.mean(), fake.mean()])
        expected = plain(torch.zeros(()), x, y, 1, 0)[0].item() + 0.3 * float(
            ((real - averages[1]) ** 2).mean() + ((fake - averages[0]) ** 2).mean()
        )
        assert loss(torch.zeros(()), x, y, 1, 0)[0].item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(loss.lecam_averages.numpy(), averages, rtol=1e-5)
    kept = loss.lecam_averages.clone()
    with torch.no_grad():
        loss.eval()(torch.zeros(()), x, y, 1, 0)
    assert torch.equal(loss.lecam_averages, kept)


def test_lecam_draws_the_logits_together(images):
    loss = loss_of(lecam_weight=1.0, lecam_decay=0.0)
    real, fake = torch.full((4,), 3.0, requires_grad=True), torch.full((4,), -1.0, requires_grad=True)
    from tamingfast.models.losses import lecam_regularization

    lecam_regularization(real, fake, torch.tensor([3.0, -1.0])).backward()
    assert (real.grad > 0).all() and (fake.grad < 0).all()
    assert "lecam_averages" in loss.state_dict() and "lecam_averages" not in loss_of().state_dict()


@pytest.mark.parametrize("shared", [False, True])
def test_the_discriminator_learns_before_it_counts(shared):
    stage = tiny.vqgan_stage({"disc_start": 10, "disc_warmup": 4, "rest_before_start": True}, shared)
    plain = tiny.vqgan_stage({"disc_start": 10, "rest_before_start": True}, shared)
    batch = tiny.images()
    for step, learns in ((5, False), (6, True), (9, True)):
        moved = []
        for each in (stage, plain):
            each.model.global_step = step
            before = {name: value.detach().clone() for name, value in each.model.named_parameters()}
            torch.manual_seed(0)
            values, after = tiny.move(each, [batch])
            moved.append(any(not torch.equal(before[name], after[name]) for name in after if "discriminator" in name))
            assert float(values["d_weight"]) == 0
        assert moved == [learns, False]
    for (name, a), b in zip(stage.model.named_parameters(), plain.model.parameters(), strict=True):
        assert "discriminator" in name or torch.equal(a, b)
    stage.model.global_step = 10
    assert tiny.move(stage, [batch])[0]["d_weight"] > 0


@pytest.mark.parametrize(("name", "value"), [("disc_warmup", -1), ("lecam_weight", -0.1), ("lecam_decay", 1)])
def test_wrong_options(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got {value}"):
        loss_of(**{name: value})


def test_a_loss_without_these_options_is_the_original_s(images):
    x, y = images
    loss = loss_of().eval()
    real, fake = logits(loss, x, y)
    hinge = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    assert_close(loss(torch.zeros(()), x, y, 1, 0)[0].detach().double(), hinge)
    assert math.isclose(float(loss(torch.zeros(()), x, y, 0, 0)[1]["train/g_loss"]), -float(fake.mean()), rel_tol=1e-5)
