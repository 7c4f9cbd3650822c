"""Training that goes wrong stops with its step and a likely cause, and leaves the last good weights."""

from __future__ import annotations

import math
import re

import pytest
import tiny
import torch

from tamingfast import UserError, load_model
from tamingfast.checkpoints import run_directory
from tamingfast.training import health, loop, vqgan


def stopped(values, losses=(), loss=math.nan, norm=1.0, batches=(), precision="float32") -> str:
    monitor = health.Monitor(1e-2, precision)
    for step, before in enumerate(losses):
        monitor.check(step, before, 1.0, {}, [])
    with pytest.raises(UserError) as caught:
        monitor.check(77, loss, norm, {name: torch.tensor(value) for name, value in values.items()}, batches)
    assert "at step 77, expected a finite number; " in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_finite_steps_pass():
    health.Monitor(1e-2, "float32").check(0, -3.0, 1e30, {}, [])


def test_values_are_read_together_and_the_first_bad_step_is_named():
    monitor = health.Monitor(1e-2, "float32", every=4)
    values = [1.0, 2.0, 3.0, 4.0, 5.0, math.nan, math.inf]
    for step, loss in enumerate(values):
        monitor.check(step, torch.tensor(loss), torch.tensor(1.0), {"nll_loss": torch.tensor(loss)}, [])
    with pytest.raises(UserError, match="loss: got nan at step 5, .*not finite: nll_loss"):
        monitor.read()
    monitor.read()  # once
    with pytest.raises(UserError, match="gradient norm: got inf at step 7"):
        monitor.check(7, torch.tensor(1.0), torch.tensor(math.inf), {}, [])


def test_a_bad_step_that_is_not_read_yet_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Monitor", lambda rate, precision, every: health.Monitor(rate, precision, 10**6))
    out = tmp_path / "run"
    config = tiny.config(tiny.VQGAN, steps=12, checkpoint_every=4, log_every=100, validate_every=100)
    with pytest.raises(UserError, match=r"at step \d+, expected .*; the image noise/7.png has NaN or infinite"):
        vqgan.train(config, out, device="cpu", datasets=(Poisoned(13), None))
    assert run_directory.progress(out)["step"] in (4, 8)
    assert all(torch.isfinite(value).all() for value in load_model(out).state_dict().values())


def test_a_bad_image_is_named():
    images = torch.zeros(3, 4, 4, 3)
    images[1, 2, 2, 0] = math.inf
    good = {"image": torch.zeros(3, 4, 4, 3), "file_path_": ["x", "y", "z"]}
    said = stopped({}, batches=[good, {"image": images, "file_path_": ["a.png", "b.png", "c.png"]}])
    assert "loss: got nan" in said and "the image b.png has NaN or infinite values" in said
    assert "number 1 of the batch" in stopped({}, batches=[{"image": images}])


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"values": {"d_weight": 5000.0}}, "adaptive discriminator weight has reached 5e+03"),
        (
            {"values": {}, "losses": [1.0] * 10 + [30.0], "loss": math.inf},
            "rose from 1 to 30.*learning rate 0.01 is probably too high",
        ),
        ({"values": {}, "precision": "bfloat16"}, "bfloat16 probably overflowed.*training.precision=float32"),
        ({"values": {"nll_loss": math.nan}}, "learning rate 0.01.*not finite: nll_loss.*grad_clip"),
        ({"values": {}, "loss": 1.0, "norm": math.inf}, "gradient norm: got inf"),
    ],
    ids=["discriminator", "rising", "precision", "otherwise", "gradient"],
)
def test_likely_cause(options, cause):
    assert re.search(cause.replace("e+03", r"e\+03"), stopped(**options))


def test_an_op_that_refuses_nan_is_explained_and_other_errors_are_not():
    monitor = health.Monitor(1e-2, "float32")
    with pytest.raises(UserError, match="inside at step 3, expected finite ones; the learning rate 0.01"):
        monitor.explain(3, ValueError("z: got NaN or infinity, expected finite numbers"), [])
    monitor.explain(3, ValueError("got an image of 5 x 5 pixels, which is finance"), [])
    monitor.explain(3, UserError("the loss is nan"), [])


def test_a_collapse_is_reported_once_and_only_when_it_lasts():
    monitor = health.Monitor(1e-2, "float32")
    low, fine = {"codebook_usage": 0.005}, {"codebook_usage": 0.5}
    told = [monitor.hints(values) for values in (low, low, fine, low, low, low, low, low)]
    assert [bool(hints) for hints in told] == [False] * 5 + [True, False, False]
    assert "codebook has collapsed" in told[5][0]


def test_a_discriminator_that_always_wins_is_reported():
    monitor = health.Monitor(1e-2, "float32")
    won = {"logits_real": 3.0, "logits_fake": -2.0}
    assert [len(monitor.hints(won)) for _ in range(4)] == [0, 0, 1, 0]
    assert not any(health.Monitor(1e-2, "float32").hints({"logits_real": 3.0, "logits_fake": 2.0}) for _ in range(4))


def test_gradient_norm():
    one, two, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(health.gradient_norm([one, two, none])) == 5.0
    assert float(health.gradient_norm([none])) == 0.0


class Poisoned(tiny.Noise):
    """Every image is fine in the first epoch; one of them is not in the second."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if self.epoch == 1 and index == 7:
            item["image"][0, 0, 0] = math.nan
        return item


def test_a_run_stops_before_the_weights_are_spoilt(tmp_path):
    out = tmp_path / "run"
    config = tiny.config(tiny.VQGAN, steps=12, checkpoint_every=1)
    with pytest.raises(UserError, match=r"at step \d+, expected .*; the image noise/7.png has NaN or infinite"):
        vqgan.train(config, out, device="cpu", datasets=(Poisoned(13), None))
    reached = run_directory.progress(out)["step"]
    assert 6 <= reached < 12 and len(run_directory.read_metrics(out, "train")) == reached
    assert all(torch.isfinite(value).all() for value in load_model(out).state_dict().values())
    vqgan.train(config, out, True, "cpu", (tiny.Noise(13), None))  # the repaired data
    assert run_directory.progress(out)["step"] == 12


def test_bad_weights_never_replace_good_ones(tmp_path):
    out = tiny.train("vqgan", tmp_path / "run", steps=1)
    before = (out / "state.pt").read_bytes(), (out / "weights.safetensors").read_bytes()
    model = load_model(out)
    model.decoder.conv_out.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(
        UserError, match="decoder.conv_out.weight: got values that are not finite after step 5.*last good checkpoint"
    ):
        run_directory.save(out, model, [], {"step": 5, "epoch": 0, "seconds": 0.0})
    assert ((out / "state.pt").read_bytes(), (out / "weights.safetensors").read_bytes()) == before
