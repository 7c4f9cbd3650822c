"""`train --from`: runs that begin with the weights of a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest
import tiny
import torch
import yaml
from commands import run
from family_files import FAMILIES
from refusals import refused, unchanged

from tamingfast import load_model
from tamingfast.checkpoints import convert

STILL = ["training.steps=1", "training.learning_rate=1e-30", "training.validation_batches=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configs of another architecture than the runs'."""
    monkeypatch.chdir(tmp_path)
    other = tiny.config(tiny.VQGAN, {"embed_dim": 8, "n_embed": 5}) | {"data": tiny.CROPS}
    Path("vqgan.yaml").write_text(yaml.safe_dump(other))
    prior = tiny.config(tiny.PRIOR) | {"data": tiny.CROPS, "prior": {"condition": "none"}}
    prior["model"]["params"]["transformer_config"]["params"]["n_embd"] = 32
    Path("prior.yaml").write_text(yaml.safe_dump(prior))
    return tmp_path


def train(stage: str, start: object, *words: object) -> int:
    return run("train", stage, f"{stage}.yaml", "--from", start, "--out", "new", "--device", "cpu", *STILL, *words)


def assert_begun_with(start: object, new: object) -> None:
    own, begun = (load_model(path).state_dict() for path in (new, start))
    own, begun = ({key: state[key] for key in state if not key.startswith("loss.")} for state in (own, begun))
    assert own.keys() == begun.keys()
    for key, value in begun.items():
        torch.testing.assert_close(own[key], value, atol=1e-6, rtol=0)


def test_a_first_stage_begins_with_the_weights_and_the_architecture(configs, runs):
    assert train("vqgan", runs / "vqgan") == 0
    assert_begun_with(runs / "vqgan", "new")
    state, before = (
        torch.load(path / "state.pt", weights_only=True)["model"] for path in (Path("new"), runs / "vqgan")
    )
    names = [key for key in before if key.startswith("loss.discriminator.") and key.endswith("weight")]
    assert names and all(torch.allclose(state[key], before[key], atol=1e-6) for key in names)
    written = yaml.safe_load(Path("new/config.yaml").read_text())["model"]["params"]
    assert written["n_embed"] == 16 and written["lossconfig"]["params"]["disc_ndf"] == 4


def test_a_published_checkpoint_is_trained_on_and_resumed(configs, caplog):
    """One of the original without a discriminator; the loss is the config's, and the run is complete in itself."""
    published = golden.checkpoint("vqmodel_f2")
    more = ["data.size=16", "model.params.lossconfig.params.disc_ndf=8", "training.learning_rate=1e-3"]
    assert train("vqgan", published, *more) == 0
    assert "has no discriminator that fits" in caplog.text
    model = load_model("new")
    assert model.n_embed == load_model(published).n_embed and model.loss.discriminator.main[0].out_channels == 8
    assert run("train", "vqgan", "--resume", "--out", "new", "--device", "cpu", "training.steps=2") == 0
    moved = load_model("new").encoder.conv_in.weight - load_model(published).encoder.conv_in.weight
    assert 0 < moved.abs().max() < 0.01
    losses = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
    assert any("aeloss" in line or "train/aeloss" in line for line in losses)


def test_a_prior_begins_with_another_s_weights(configs, runs):
    assert train("prior", runs / "prior") == 0
    assert_begun_with(runs / "prior", "new")
    converted = convert(runs / "prior", configs / "prior.safetensors")
    assert run("train", "prior", "prior.yaml", "--from", converted, "--out", "again", "--device", "cpu", *STILL) == 0
    assert_begun_with(runs / "prior", "again")


def test_data_of_the_model_are_the_default(configs, runs):
    for stage in ("vqgan", "prior"):
        config = yaml.safe_load(Path(f"{stage}.yaml").read_text())
        del config["data"]
        Path(f"{stage}.yaml").write_text(yaml.safe_dump(config))
        assert run("train", stage, f"{stage}.yaml", "--from", runs / stage, "--out", f"{stage}-run", *STILL) == 0
        assert yaml.safe_load(Path(f"{stage}-run/config.yaml").read_text())["data"]["name"] == "photos"


def test_what_does_not_go_together_is_refused(configs, runs):
    new = ["--out", "new"]
    with unchanged(configs):
        for words, said in (
            (
                ["vqgan", "vqgan.yaml", "--from", runs / "prior", *new],
                "got a Net2NetTransformer, which this stage does not",
            ),
            (["prior", "prior.yaml", "--from", runs / "vqgan", *new], "got a VQModel, which this stage does not train"),
            (["vqgan", "vqgan.yaml", "--from", "none", *new], "none: got no file"),
            (["vqgan", "vqgan.yaml", "--from", runs / "vqgan", *new, "model.params.n_embed=8"], "model.params.n_embed"),
            (["prior", "prior.yaml", "--from", runs / "prior", *new, "prior.condition=class"], "prior.condition"),
            (["vqgan", "--resume", "--from", runs / "vqgan", *new], "--from: got a model to begin with"),
            (["prior", "prior.yaml", "--from", runs / "prior", "--first-stage", runs / "vqgan", *new], "--first-stage"),
        ):
            assert said in refused("train", *words)


# What a run of the original's trainer can be; a config that is not beside the weights is given to `convert` first.
FAMILY_FILES = [
    ("latent-diffusion VQ", "interface"), ("latent-diffusion VQ", "without attention"),
    ("latent-diffusion VQ", "inside a diffusion model"), ("LlamaGen VQ", "training"), ("Janus", "in parts"),
    ("IBQ", "averages"), ("Open-MAGVIT2", "averages"), ("diffusers VQModel", "aMUSEd"), ("diffusers VQModel", "MoVQ"),
    ("MaskGIT-VQGAN", "file"), ("vqgan-jax", "folder"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), FAMILY_FILES)
def test_every_family_is_trained_on(family, name, configs):
    torch.manual_seed(0)
    made = FAMILIES[family][name](configs)
    start = made.path
    if made.config is not None:
        assert run("convert", start, "start.safetensors", "--config", made.config) == 0
        start = Path("start.safetensors")
    assert train("vqgan", start, "data.size=16") == 0
    assert_begun_with(start, "new")
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(load_model("new").encode_grid(x), load_model(start).encode_grid(x))
    assert type(load_model("new")) is type(load_model(start))
