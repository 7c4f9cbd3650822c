"""Every family's checkpoints open as they are published, and compute what an independent network computes."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from commands import run
from families import Reference, Style
from family_files import FAMILIES, Published, nested, packed
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import tamingfast
from tamingfast import checkpoints, tasks
from tamingfast.checkpoints.formats import FAMILIES as OURS
from tamingfast.checkpoints.formats import llamagen_gpt
from tamingfast.checkpoints.locate import weights_path
from tamingfast.checkpoints.weights import read_state_dict
from tamingfast.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CASES = [(family, name) for family, files in FAMILIES.items() for name in files]
#: Families that diffusers' VQModel can be, as files of theirs show.
FOR_DIFFUSERS = [
    ("latent-diffusion VQ", "plain"), ("latent-diffusion VQ", "inside a diffusion model"), ("IBQ", "its VQModel"),
    ("diffusers VQModel", "folder"), ("diffusers VQModel", "aMUSEd"), ("vqgan-jax", "folder"),
]  # fmt: skip


def published(family: str, name: str, folder: Path) -> Published:
    torch.manual_seed(0)
    return FAMILIES[family][name](folder)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def check(model: torch.nn.Module, made: Published) -> None:
    """The model's tokens, latents and images are those of the reference."""
    x = images()
    shifted = made.reference.style.range01
    latents = made.reference.latents((x + 1) / 2 if shifted else x)
    tokens, quant = made.reference.quantise(latents)
    decoded = made.reference.decode(quant)
    decoded = 2 * decoded - 1 if shifted else decoded
    with torch.no_grad():
        assert torch.equal(model.encode_grid(x), tokens) and len(tokens.unique()) > 2
        for out in (model.decode_grid(tokens), model.decode_code(tokens), model(x)[0]):
            torch.testing.assert_close(out, decoded, atol=1e-4, rtol=1e-4)
        if not made.interface:
            found, _, (_, _, indices) = model.encode(x)
            assert torch.equal(indices.view_as(tokens), tokens)
            torch.testing.assert_close(found, quant, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.decode(found), decoded, atol=1e-4, rtol=1e-4)
            return
        torch.testing.assert_close(model.encode(x), latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.decode(latents), decoded, atol=1e-4, rtol=1e-4)
        raw = made.reference.decode(latents)
        raw = 2 * raw - 1 if shifted else raw
        torch.testing.assert_close(model.decode(latents, force_not_quantize=True), raw, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_published_checkpoint_opens_and_converts(family, name, tmp_path):
    made = published(family, name, tmp_path)
    model = tamingfast.load_model(made.path, made.config)
    assert model.config["family"] == family
    check(model, made)
    converted = checkpoints.convert(made.path, tmp_path / "ours.safetensors", made.config)
    check(tamingfast.load_model(converted), made)
    assert tasks.inspect(converted)["family"] == family
    if made.config is None:
        facts = tasks.inspect(made.path)
        assert (facts["family"], facts["first_stage"]) == (family, tasks.inspect(converted)["first_stage"])


def test_the_documentation_has_a_row_for_every_family():
    text = (ROOT / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", text, re.MULTILINE)
    first_stages = [family.name for family in OURS if family is not llamagen_gpt.FAMILY]
    assert rows == list(FAMILIES) == list(dict.fromkeys(first_stages))


@pytest.mark.parametrize(("family", "name"), FOR_DIFFUSERS)
def test_the_layout_of_diffusers(family, name, tmp_path):
    made = published(family, name, tmp_path)
    out = checkpoints.convert(made.path, tmp_path / "theirs", made.config, layout="diffusers")
    assert sorted(os.listdir(out)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    check(tamingfast.load_model(out), made._replace(interface=True))
    if family == "diffusers VQModel":
        state = load_file(out / "diffusion_pytorch_model.safetensors")
        assert state.keys() == made.reference.state.keys()
        assert all(torch.equal(state[key], value) for key, value in made.reference.state.items())
        before = json.loads(next(made.path.rglob("config.json")).read_text())
        assert {key: before[key] for key in before if key != "_diffusers_version"}.items() <= json.loads(
            (out / "config.json").read_text()
        ).items()


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("LlamaGen VQ", "file", "codes=unit"), ("IBQ", "raw", "codes=dot"),
        ("Open-MAGVIT2", "raw", "LookupFreeVQModel"),
        ("latent-diffusion VQ", "without attention", "tanh_out=True"), ("vqgan-jax", "without convolutions", "resamp"),
        ("MaskGIT-VQGAN", "file", "branch_shortcut|resamp_with_conv"),
    ],
)  # fmt: skip
def test_what_diffusers_has_no_layout_for_is_refused(family, name, why, tmp_path):
    made = published(family, name, tmp_path)
    with pytest.raises(UserError, match=rf"^layout: got 'diffusers' for a .*({why})"):
        checkpoints.convert(made.path, tmp_path / "theirs", made.config, layout="diffusers")
    assert not (tmp_path / "theirs").exists()


def refused(path: Path, config: object = None) -> str:
    """The sentence with which a checkpoint is refused; it names the file and nothing of Python."""
    with pytest.raises(UserError) as error:
        tamingfast.load_model(path, config)
    text = str(error.value)
    assert text.count("\n") == 0 and ": got " in text and ", expected " in text
    return text


def kl(folder: Path) -> Path:
    """The KL autoencoder of latent-diffusion: a VQGAN's network, twice the latents, no codebook."""
    state = {k: v for k, v in Reference(Style(), 1).state.items() if not k.startswith("quantize.")}
    for name in ("encoder.conv_out", "quant_conv"):
        state |= {f"{name}.{part}": torch.cat([state[f"{name}.{part}"]] * 2) for part in ("weight", "bias")}
    state["quant_conv.weight"] = torch.cat([state["quant_conv.weight"]] * 2, 1)
    torch.save({"state_dict": state}, folder / "model.ckpt")
    return folder / "model.ckpt"


def test_what_has_no_codebook_is_named(tmp_path):
    path = kl(tmp_path)
    assert "a KL autoencoder" in refused(path) and "no codebook" in refused(path)
    model = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4}}
    assert "a KL autoencoder" in refused(path, {"model": model})
    whole = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"first_stage_config": model}}
    assert "a KL autoencoder" in refused(path, {"model": whole})
    for name in ("AutoencoderKL", "VQModelPaella", "UNet2DModel"):
        made = published("diffusers VQModel", "folder", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"_class_name": name}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert ("a KL autoencoder" if "KL" in name else f"a '{name}' of diffusers") in refused(made.path)


def test_weights_that_do_not_show_enough_are_refused(tmp_path):
    made = published("diffusers VQModel", "folder", tmp_path)
    (tmp_path / "config.json").unlink()
    assert "expected its config.json" in refused(made.path)
    made = published("Open-MAGVIT2", "averages", tmp_path)
    assert "no config that says which count" in refused(made.path)
    made = published("IBQ", "averages", tmp_path)
    assert "no config that says which count" in refused(made.path)


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] in ("plain", "file", "raw", "folder")])
def test_a_part_of_the_weights_is_refused(family, name, tmp_path):
    made = published(family, name, tmp_path)
    path = weights_path(made.path)
    state = read_state_dict(path)
    names = list(state)
    for missing in names[:: max(1, len(names) // 7)]:
        part = {name: state[name].contiguous() for name in names if name != missing}
        if path.suffix == ".msgpack":
            path.write_bytes(packed(nested(part)))
        elif path.suffix == ".safetensors":
            save_file(part, path)
        else:
            torch.save({"state_dict": part}, path)
        refused(made.path, made.config)


def test_the_config_of_another_family_is_refused(tmp_path):
    made = published("LlamaGen VQ", "folder", tmp_path)
    for config in (
        {"_class_name": "VQModel", "block_out_channels": [32, 64]},
        {"_class_name": "VQModel", "block_out_channels": "many"},
        {"n_embed": 4, "embed_dim": 4, "ch_mult": [1], "z_channels": 4, "num_res_blocks": 1},
        {"codebook_size": 20, "encoder_ch_mult": [1, 1, 2], "decoder_ch_mult": [1, 3]},
        {"codebook_size": 20, "encoder_ch_mult": 7},
        {"model": {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": {"n_embed": 4, "embed_dim": 4}}},
        {"model": {"class_path": "src.IBQ.models.ibqgan.IBQ"}},
        {"model": {"class_path": "src.Open_MAGVIT2.models.lfqgan.VQModel", "init_args": {"n_embed": 8}}},
        {"model": {"class_path": "src.Open_MAGVIT2.models.other.Model", "init_args": {"n_embed": 8}}},
        {"model": {"target": "ldm.models.autoencoder.VQModel"}},
        {"model": {"target": "ldm.models.autoencoder.VQModel", "params": {"n_embed": 8}}},
    ):
        refused(made.path, config)


ODD = [torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.zeros(2, 2), torch.zeros(1, 0, 3, 3),
       torch.zeros(7, 3, 3, 3), torch.zeros(1, 1, 1, 1, 1), torch.zeros(32, 3, 3, 3, dtype=torch.bool)]  # fmt: skip


@pytest.mark.parametrize("count", [6, pytest.param(150, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("family", "name"), [case for case in CASES if case[0] != "vqgan-jax" and case[1] != "in parts"]
)
def test_any_tensors_under_any_names_and_shapes(family, name, count, tmp_path):
    """A model, or a UserError that names a file."""
    chance = random.Random(f"{family} {name} {count}")
    made = published(family, name, tmp_path)
    path = weights_path(made.path)
    state = read_state_dict(path)
    for _ in range(count):
        changed = dict(state)
        for key in chance.sample(list(state), chance.choice((1, 1, 2, 20))):
            value = changed.pop(key)
            if chance.random() < 0.5:
                changed[key] = chance.choice(ODD)
            else:
                changed[key.replace("0", chance.choice(("1", "99999999999", "x", "")))] = value
        saved = {key: value.clone() for key, value in changed.items()}
        save_file(saved, path) if path.suffix == ".safetensors" else torch.save({"state_dict": saved}, path)
        text = path.name
        try:
            tamingfast.load_model(made.path, made.config)
        except UserError as error:
            text = str(error)
        assert path.name in text or ".params." in text


STRANGE = [None, "", "x", -1, 0, 1.5, [], {}, [None], ["x"], 10**30, True]


@pytest.mark.parametrize(
    ("family", "name"),
    [("LlamaGen VQ", "folder"), ("Janus", "one file"), ("diffusers VQModel", "folder"), ("diffusers VQModel", "MoVQ"),
     ("vqgan-jax", "folder"), ("IBQ", "averages"), ("latent-diffusion VQ", "inside a diffusion model")],
)  # fmt: skip
def test_strange_values_in_configs(family, name, tmp_path):
    """A model, or a UserError."""
    made = published(family, name, tmp_path)
    file = made.config or next(path for path in tmp_path.glob("config.*"))
    config = yaml.safe_load(file.read_text())
    chance = random.Random(name)
    for place, key in places(config):
        before = place[key]
        for value in chance.sample(STRANGE, 3):
            place[key] = value
            text = ""
            try:
                tamingfast.load_model(made.path, config)
            except UserError as error:
                text = str(error)
            assert "\n" not in text
        place[key] = before


def places(config: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of nested mappings, with the mapping that holds it."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield config, key
            yield from places(value)


def test_nothing_that_an_index_or_a_msgpack_says_is_believed(tmp_path):
    made = published("Janus", "in parts", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for places in (
        {},
        {"a": "../model.safetensors"},
        {"a": 3},
        {"a": index.name},
        {"gen_vision_model.a": "model-0.safetensors"},
    ):
        index.write_text(json.dumps({"weight_map": places}))
        refused(made.path)
    (tmp_path / "flax").mkdir()
    made = published("vqgan-jax", "folder", tmp_path / "flax")
    file = made.path / "flax_model.msgpack"
    content = file.read_bytes()
    for damaged in (
        content[:-9],
        content + b"\0",
        content[:200],
        b"\x81\xa1a" + b"\x91" * 90,
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
    ):
        file.write_bytes(damaged)
        assert "flax_model.msgpack" in refused(made.path)


DAMAGED = {
    "{": "unreadable JSON", "": "unreadable JSON", '{"n_embed": 8, ': "unreadable JSON", "[1, 2]": "got no mapping",
    "\ud800": "bytes that are not text", '{"a": ' * 90 + "1" + "}" * 90: "levels", " " * (1 << 21): "more than",
}  # fmt: skip


@pytest.mark.parametrize("said", DAMAGED.values(), ids=range(len(DAMAGED)))
@pytest.mark.parametrize(
    ("family", "name"),
    [("LlamaGen VQ", "file"), ("LlamaGen VQ", "folder"), ("Janus", "in parts"), ("diffusers VQModel", "aMUSEd"),
     ("MaskGIT-VQGAN", "file"), ("vqgan-jax", "folder"), ("Open-MAGVIT2", "no config")],
)  # fmt: skip
def test_a_damaged_config_json_is_refused_wherever_it_lies(family, name, said, tmp_path):
    made = published(family, name, tmp_path)
    file = weights_path(made.path).with_name("config.json")
    for text in (text for text, why in DAMAGED.items() if why == said):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        found = refused(made.path)
        assert found.startswith(f"{file}: got ") and said in found


def test_a_config_json_of_something_else_is_left_out(tmp_path):
    made = published("LlamaGen VQ", "file", tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 64, "n_layer": 2}')
    check(tamingfast.load_model(made.path), made)
    assert tasks.inspect(made.path)["config"] is None


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("latent-diffusion VQ", "interface"),
        ("LlamaGen VQ", "file"),
        ("Open-MAGVIT2", "no config"),
        ("MaskGIT-VQGAN", "file"),
    ],
)
def test_they_are_first_stages_like_any_other(family, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = published(family, name, tmp_path)
    (tmp_path / "photos").mkdir()
    for number, pixels in enumerate(tiny.photographs(4, 16)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    path = str(made.path)
    assert run("reconstruct", path, "photos/0.png", "--out", "r.png") == 0
    assert run("encode", path, "--out", "t.safetensors", "name=folder", "path=photos", "size=16") == 0
    assert run("evaluate", path, "--data", "photos", "--limit", "2") == 0
    assert tasks.inspect("t.safetensors")["first_stage"] == tasks.inspect(path)["first_stage"]
    settings = ["data.name=folder", "data.path=photos", "data.size=16", "training.steps=1", "prior.condition=none"]
    OmegaConf.save(OmegaConf.create(tiny.config(tiny.PRIOR, steps=1)), "prior.yaml")
    assert run("train", "prior", "prior.yaml", "--first-stage", path, "--out", "prior", *settings) == 0, (
        capsys.readouterr()
    )
    made.path.unlink()
    assert run("sample", "prior", "-n", "1", "--out", "s.png") == 0
    stage = tamingfast.load_model("prior").first_stage_model
    check(stage, made)


@pytest.mark.skipif("TAMINGFAST_ZOO" not in os.environ, reason="TAMINGFAST_ZOO names no directory of recorded cases")
def test_recorded_cases():
    """``TAMINGFAST_ZOO``: a directory with check_zoo.py, and beside it the cases to give to it."""
    zoo = Path(os.environ["TAMINGFAST_ZOO"])
    done = subprocess.run(
        [sys.executable, zoo / "check_zoo.py", zoo, "--all"], capture_output=True, text=True, env=os.environ, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
