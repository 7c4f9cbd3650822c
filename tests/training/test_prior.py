"""Training of the second stage: the original's steps, the generated config, and what it trains on."""

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
from tamingfast.training import load_config, loop, prior, vqgan
from tamingfast.training.colors import fit_color_clusters


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    return tiny.train("vqgan", tmp_path_factory.mktemp("first") / "run", steps=2)


def test_six_steps_equal_the_reference():
    recorded = golden.arrays("transformer_training")
    model = load_model(golden.checkpoint("transformer_training")).train()
    stage = prior.PriorStage(model, float(recorded["lr"]), (16, 16))
    batch = {"image": torch.from_numpy(recorded["x"]).permute(0, 2, 3, 1)}
    losses = [float(loop.step(stage.optimizers, stage.loss, [batch])["loss"]) for _ in recorded["loss"]]
    assert losses == pytest.approx(recorded["loss"].tolist(), abs=1e-4)


def config_on(first_stage, grid=(4, 4), classes=None, **prior_section):
    return prior.prior_config(load_model(first_stage).config, {"prior": prior_section}, grid, classes)


def test_config_without_a_condition(first_stage):
    params = config_on(first_stage)["model"]["params"]
    assert params["cond_stage_config"] == "__is_unconditional__" and params["cond_stage_key"] == "image"
    assert params["transformer_config"]["params"] == {"vocab_size": 16, "block_size": 17}
    assert params["first_stage_config"]["params"]["lossconfig"]["target"].endswith("DummyLoss")
    assert "permuter_config" not in params


def test_vocabulary_holds_the_classes(first_stage):
    params = config_on(first_stage, classes=40, condition="class")["model"]["params"]
    assert params["transformer_config"]["params"]["vocab_size"] == 40
    assert params["cond_stage_config"]["params"] == {"n_classes": 40}
    assert (
        config_on(first_stage, condition="class", classes=3)["model"]["params"]["transformer_config"]["params"][
            "vocab_size"
        ]
        == 16
    )


def test_a_given_condition_stage_is_kept(first_stage):
    coordinates = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 20, "down_factor": 2}}
    model = {"params": {"cond_stage_config": coordinates, "cond_stage_key": "coord"}}
    params = prior.prior_config(load_model(first_stage).config, {"model": model}, (4, 4))["model"]["params"]
    assert params["cond_stage_config"] == coordinates and params["cond_stage_key"] == "coord"
    assert params["transformer_config"]["params"] == {"vocab_size": 21, "block_size": 32}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"condition": "clas"}, "prior.condition is 'clas'.*did you mean 'class'"),
        ({"condition": "class"}, "the data have none"),
        ({"ordering": "spiralout"}, "prior.ordering.*did you mean 'spiral_out'"),
    ],
)
def test_unknown_choices(first_stage, section, said):
    with pytest.raises(UserError, match=said):
        config_on(first_stage, **section)


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
    stage = prior.PriorStage(load_model(out), 1e-3, (4, 4))
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
    config = tiny.config(tiny.PRIOR, {"pkeep": 1.0}, steps=60, learning_rate=1e-2, batch_size=4)
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
    with pytest.raises(UserError, match="written with 17 codes but the first stage has 16"):
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
    with pytest.raises(UserError, match="64 pixels, fewer than the 512 colours"):
        fit_color_clusters(tiny.Noise(1), 512, seed=0, out=tmp_path / "colours")


def test_a_prior_is_no_first_stage(first_stage, tmp_path):
    out = tiny.train("prior", tmp_path / "run", first_stage, steps=1)
    with pytest.raises(UserError, match="Net2NetTransformer, which is no first stage"):
        tiny.train("prior", tmp_path / "other", out)


def test_bfloat16_keeps_the_tokens_and_trains(first_stage, tmp_path):
    out = tiny.train("prior", tmp_path / "run", first_stage, steps=3, precision="bfloat16")
    low = [line["loss"] for line in run_directory.read_metrics(out, "train")]
    out = tiny.train("prior", tmp_path / "full", first_stage, steps=3)
    assert low == pytest.approx([line["loss"] for line in run_directory.read_metrics(out, "train")], rel=2e-2)
    model = load_model(out)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = {"image": torch.rand(2, 8, 8, 3) * 2 - 1, "class_label": torch.tensor([0, 1])}
    expected = prior.tokens_of(model, batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior.tokens_of(model, batch)[0], expected)


def test_presets_fit_a_first_stage(first_stage):
    for name, size in (("gpt2_small", 85.1e6), ("gpt2_medium", 302.3e6)):
        config = prior.prior_config(load_model(first_stage).config, load_config(name), (16, 16))
        with torch.device("meta"):
            model = vqgan.instantiate_from_config({key: config["model"][key] for key in ("target", "params")})
        blocks = sum(p.numel() for p in model.transformer.blocks.parameters())
        assert blocks == pytest.approx(size, rel=1e-3)
        assert config["model"]["params"]["transformer_config"]["params"]["block_size"] == 257


def test_two_processes_take_the_steps_of_one(first_stage, tmp_path):
    """Under torchrun: the same images, the same averaged gradients, one set of files."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "import tiny\n"
        "from tamingfast.training import prior\n"
        "config = tiny.config(tiny.PRIOR, {'pkeep': 1.0}, steps=3, batch_size=int(sys.argv[3]))\n"
        "config['model']['params']['transformer_config']['params']['resid_pdrop'] = 0.0\n"
        "prior.train(config, Path(sys.argv[1]), Path(sys.argv[2]), device='cpu', datasets=tiny.datasets())\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    subprocess.run([sys.executable, script, first_stage, alone, "4"], check=True, env=environment, timeout=120)
    # The exit status is left out: under load gloo's threads now and then abort a process that has done all its
    # work and left the group ("terminate called without an active exception"). What the run wrote is what counts.
    subprocess.run([*launch, script, first_stage, both, "2"], env=environment, timeout=120)
    assert run_directory.progress(both)["step"] == 3
    one, two = (run_directory.read_metrics(out, "train") for out in (alone, both))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    expected = load_model(alone).state_dict()
    for name, value in load_model(both).state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=5e-5, rtol=1e-4)


def test_the_original_s_unconditional_layout_is_accepted(tmp_path):
    """Its config has a condition stage with a placeholder that is never built, and no number of steps."""
    gpt = {"vocab_size": 16, "block_size": 17, "n_layer": 1, "n_head": 1, "n_embd": 8}
    stage = {
        "embed_dim": 4,
        "n_embed": 16,
        "ckpt_path": "first.ckpt",
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        "ddconfig": tiny.VQGAN["model"]["params"]["ddconfig"],
    }
    config = {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": {
                "first_stage_key": "image",
                "cond_stage_key": "depth",
                "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
                "first_stage_config": {"target": "taming.models.vqgan.VQModel", "params": stage},
                "unconditional": True,
                "cond_stage_config": {"target": "taming.models.vqgan.VQModel", "params": {"dummyparam": 0}},
            },
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 5,
                "train": {
                    "target": "taming.data.custom.CustomTrain",
                    "params": {"training_images_list_file": "some/training.txt", "size": 256},
                },
            },
        },
    }
    path = tmp_path / "custom_transformer.yaml"
    path.write_text(json.dumps(config))
    loaded = load_config(path)
    assert loaded.training.batch_size == 5 and loaded.data.size == 256
    stage["resolutions"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="first_stage_config.params.resolutions"):
        load_config(path)
