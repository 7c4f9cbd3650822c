"""Training of the second stage: the original's steps, the contents of a run, and the data that it can train on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import tiny
import torch

from tamingfast import UserError, load_model
from tamingfast.checkpoints import run_directory
from tamingfast.checkpoints.config import plain
from tamingfast.data.tokens import write_tokens
from tamingfast.training import load_config, prior
from tamingfast.training.colors import fit_color_clusters
from tamingfast.training.prior_stage import PriorStage
from tamingfast.training.step import step
from tamingfast.training.tokens import tokens_of


def test_six_steps_equal_the_reference():
    recorded = golden.arrays("transformer_training")
    model = load_model(golden.checkpoint("transformer_training")).train()
    stage = PriorStage(model, float(recorded["lr"]), (16, 16))
    batch = {"image": torch.from_numpy(recorded["x"]).permute(0, 2, 3, 1)}
    losses = [float(step(stage.optimizers, stage.loss, [batch])["loss"]) for _ in recorded["loss"]]
    assert losses == pytest.approx(recorded["loss"].tolist(), abs=1e-4)


def test_run_is_a_prior_with_the_first_stage_inside(first_stage, tmp_path):
    out = tiny.train("prior", tmp_path / "run", first_stage, steps=8, image_every=8)
    model, first = load_model(out), load_model(first_stage)
    for name, value in first.state_dict().items():
        if not name.startswith("loss."):
            assert torch.equal(model.state_dict()[f"first_stage_model.{name}"], value)
    lines = run_directory.read_metrics(out, "validation")
    assert [line["step"] for line in lines] == [6, 8]
    assert lines[-1]["perplexity"] == pytest.approx(math.exp(lines[-1]["nll"]))
    assert lines[-1]["nll"] < 2 * math.log(16)
    assert (out / "images" / "00000008.png").is_file()
    recorded = plain(load_model(out).config)["model"]["params"]
    assert recorded["cond_stage_config"]["params"]["n_classes"] == 3 and recorded["pkeep"] == 0.9


def test_only_linear_weights_decay_and_the_first_stage_is_frozen(first_stage, tmp_path):
    out = tiny.train("prior", tmp_path / "run", first_stage, steps=1)
    stage = PriorStage(load_model(out), 1e-3, (4, 4))
    decayed, free = stage.optimizers[0].param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0) and decayed["betas"] == (0.9, 0.95)
    assert {id(p) for p in decayed["params"]} == {
        id(m.weight) for m in stage.model.transformer.modules() if isinstance(m, torch.nn.Linear)
    }
    trained = sum(p.numel() for group in (decayed, free) for p in group["params"])
    assert trained == sum(p.numel() for p in stage.model.transformer.parameters())
    stage.model.train()
    assert not stage.model.first_stage_model.training and stage.model.transformer.training


def test_learning_lowers_the_loss(first_stage, tmp_path):
    config = tiny.config(tiny.PRIOR, {"pkeep": 1.0}, steps=30, learning_rate=1e-2, batch_size=4)
    data = tiny.Noise(4)
    data.set_epoch = lambda epoch: None
    out = prior.train(config, first_stage, tmp_path / "run", device="cpu", datasets=(data, data))
    losses = [line["loss"] for line in run_directory.read_metrics(out, "train")]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


@pytest.mark.parametrize("ordering", ["row_major", "spiral_out", "z_curve"])
def test_token_files_train_as_their_images_do(first_stage, tmp_path, ordering):
    class Still(tiny.Noise):
        def set_epoch(self, epoch):
            pass

    class Tokens(Still):
        grid, vocab_size = (4, 4), 16
        stage = load_model(first_stage)

        def __getitem__(self, index):
            item = super().__getitem__(index)
            with torch.no_grad():
                indices = self.stage.encode(item.pop("image").permute(2, 0, 1)[None])[2][2]
            return {"indices": indices.view(4, 4), "class_label": item["class_label"]}

    losses = []
    for kind in (Still, Tokens):
        config = tiny.config(tiny.PRIOR, steps=3)
        config["prior"] = {"condition": "class", "ordering": ordering}
        out = prior.train(config, first_stage, tmp_path / kind.__name__, device="cpu", datasets=(kind(9), kind(4, 1)))
        losses.append([line["loss"] for line in run_directory.read_metrics(out, "train")])
    assert losses[0] == losses[1]


def test_a_token_file_by_name(first_stage, tmp_path):
    grids = torch.randint(0, 16, (6, 4, 4), generator=torch.Generator().manual_seed(0))
    path = token_file(tmp_path / "codes.safetensors", grids, 16)
    config = tiny.config(tiny.PRIOR, steps=2)
    config |= {"data": {"name": "tokens", "path": str(path)}, "prior": {"condition": "none"}}
    out = prior.train(config, first_stage, tmp_path / "run", device="cpu")
    assert len(run_directory.read_metrics(out, "train")) == 2 and not run_directory.read_metrics(out, "validation")
    config["data"]["path"] = str(token_file(tmp_path / "other.safetensors", grids, 17))
    with pytest.raises(UserError, match="data.path: got tokens out of 17 codes, expected 16"):
        prior.train(config, first_stage, tmp_path / "other", device="cpu")


def token_file(path, grids, vocab_size):
    write_tokens(path, grids, vocab_size)
    return path


def test_pixel_baseline(tmp_path):
    first = fit_color_clusters(tiny.Noise(13), 8, seed=0, out=tmp_path / "colours", data={"name": "photos", "size": 8})
    again = fit_color_clusters(tiny.Noise(13), 8, seed=0, out=tmp_path / "again")
    colours = load_model(first)
    assert torch.equal(colours.kmeans.C, load_model(again).kmeans.C)
    image = tiny.Noise(13)[0]["image"].permute(2, 0, 1)[None]
    assert float((colours(image)[0] - image).abs().mean()) < 0.3  # eight colours for thirteen images
    config = tiny.config(tiny.PRIOR, steps=3, image_every=3)
    del config["prior"]
    out = prior.train(config, first, tmp_path / "run", device="cpu", datasets=tiny.datasets())
    transformer = load_model(out).transformer
    assert transformer.config.vocab_size == 8 and transformer.config.block_size == 65
    assert (out / "images" / "00000003.png").is_file()


def test_too_few_pixels_for_the_colours(tmp_path):
    with pytest.raises(UserError, match="ncluster: got 512 colours for 64 pixels"):
        fit_color_clusters(tiny.Noise(1), 512, seed=0, out=tmp_path / "colours")


def test_a_prior_is_no_first_stage(first_stage, tmp_path):
    out = tiny.train("prior", tmp_path / "run", first_stage, steps=1)
    with pytest.raises(UserError, match="got a Net2NetTransformer, expected a first stage"):
        tiny.train("prior", tmp_path / "other", out)


def test_bfloat16_keeps_the_tokens_and_trains(first_stage, tmp_path):
    out = tiny.train("prior", tmp_path / "run", first_stage, steps=3, precision="bfloat16")
    low = [line["loss"] for line in run_directory.read_metrics(out, "train")]
    out = tiny.train("prior", tmp_path / "full", first_stage, steps=3)
    assert low == pytest.approx([line["loss"] for line in run_directory.read_metrics(out, "train")], rel=2e-2)
    model = load_model(out)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = {"image": torch.rand(2, 8, 8, 3) * 2 - 1, "class_label": torch.tensor([0, 1])}
    expected = tokens_of(model, batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokens_of(model, batch)[0], expected)


def test_two_processes_take_the_steps_of_one(first_stage, tmp_path):
    """Under torchrun: the same images, the same averaged gradients, one set of files."""
    config = tiny.config(tiny.PRIOR, {"pkeep": 1.0}, steps=3, batch_size=4)
    config["model"]["params"]["transformer_config"]["params"]["resid_pdrop"] = 0.0
    alone, both = tmp_path / "alone", tmp_path / "both"
    prior.train(config, first_stage, alone, device="cpu", datasets=tiny.datasets())
    config["training"]["batch_size"] = 2
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})\n"
        "import tiny\n"
        "from tamingfast.training import prior\n"
        f"config = json.loads({json.dumps(config)!r})\n"
        "prior.train(config, sys.argv[1], sys.argv[2], device='cpu', datasets=tiny.datasets())\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # The exit status is left out: under load gloo's threads now and then abort a process that has done all its
    # work and left the group ("terminate called without an active exception"). What the run wrote is what counts.
    subprocess.run([*launch, script, first_stage, both], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert run_directory.progress(both)["step"] == 3
    one, two = (run_directory.read_metrics(out, "train") for out in (alone, both))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    expected = load_model(alone).state_dict()
    for name, value in load_model(both).state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=5e-5, rtol=1e-4)


def test_settings_of_a_prior_beside_a_complete_model_are_refused(first_stage, tmp_path):
    out = tiny.train("prior", tmp_path / "run", first_stage, steps=1)
    complete = load_config(out / "config.yaml", ["prior.condition=none"])
    with pytest.raises(UserError, match="prior: got .*'none'.* beside a complete model"):
        prior.train(complete, None, tmp_path / "other", device="cpu")
