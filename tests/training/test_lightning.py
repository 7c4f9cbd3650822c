"""Our models in Lightning's Trainer: two steps of each stage, and checkpoints that are the original's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch
import yaml
from torch.utils.data import DataLoader

from tamingfast import load_model


@pytest.fixture
def trainer(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning trains these modules")

    def made(**settings):
        return lightning.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=1,
            logger=False, enable_progress_bar=False, enable_model_summary=False, **settings,
        )  # fmt: skip

    return made


def batches() -> DataLoader:
    return DataLoader(tiny.Noise(4), batch_size=2)


def test_two_steps_of_a_first_stage(trainer, tmp_path):
    from tamingfast.training.lightning import VQGANModule

    torch.manual_seed(0)
    model = tiny.build(tiny.VQGAN)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    fitted = trainer(enable_checkpointing=False)
    module = VQGANModule(model, 1e-3)
    fitted.fit(module, batches(), batches())
    moved = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"encoder", "decoder", "quantize", "loss"} <= moved
    assert module._steps == 2 and torch.isfinite(fitted.callback_metrics["val/rec_loss"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == model.state_dict().keys()  # the original's names, without those of the wrapper
    (tmp_path / "last.yaml").write_text(yaml.safe_dump({"model": tiny.VQGAN["model"]}))
    assert torch.equal(load_model(tmp_path / "last.ckpt").encoder.conv_in.weight, model.encoder.conv_in.weight)


def test_the_steps_are_those_of_our_own_loop(trainer):
    """Without dropout the weights after two steps are bit for bit those of `tamingfast.training.step`."""
    from tamingfast.training.lightning import VQGANModule

    stage = tiny.vqgan_stage()
    for batch in batches():
        _, expected = tiny.move(stage, [batch])
        stage.model.global_step += 1
    other = tiny.vqgan_stage()
    trainer(enable_checkpointing=False, num_sanity_val_steps=0).fit(VQGANModule(other.model, 1e-3), batches())
    for name, value in other.model.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)


def test_a_run_continues_from_its_checkpoint(trainer, tmp_path):
    from tamingfast.training.lightning import VQGANModule

    first = trainer(enable_checkpointing=False)
    first.fit(VQGANModule(tiny.vqgan_stage().model, 1e-3), batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    module = VQGANModule(tiny.vqgan_stage().model, 1e-3)
    again = trainer(enable_checkpointing=False)
    again.fit_loop.max_epochs = 2
    again.fit(module, batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert module._steps == 4


def test_two_steps_of_a_prior(trainer):
    from networks import prior

    from tamingfast.training.lightning import PriorModule

    model = prior()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    fitted = trainer(enable_checkpointing=False)
    fitted.fit(PriorModule(model, 1e-3), batches(), batches())
    moved = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"transformer"} and torch.isfinite(fitted.callback_metrics["val/loss"])


def test_without_lightning_the_error_says_what_to_install():
    code = "import sys; sys.modules['lightning'] = None; import tamingfast.training.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(": pip install lightning")
