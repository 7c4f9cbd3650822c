"""Models in the Hub's layout, and repositories: tested against a local server of the Hub's API."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import golden
import hub_server
import llamagen
import pytest
import torch
import yaml
from commands import pixels_of, run
from family_files import FAMILIES
from PIL import Image
from refusals import refused

from tamingfast import Net2NetTransformer, UserError, VQModel, load_model, tasks
from tamingfast.checkpoints import hub as repositories

FIGURES = {
    "data": "12 image files as 32x32",
    "reconstruction": {"images": 12, "l1": 0.25, "psnr": 21.5, "lpips": None},
    "likelihood": {"images": 12, "nats_per_token": 3.25},
    "distances": {
        "samples": {"network": "efficientnet-lite0", "images": 4, "real_images": 12, "frechet_distance": 7.5}
    },
}
MACHINE = {"cpu": "a CPU", "threads": 2, "gpu": "no GPU", "torch": "2.0", "python": "3.11"}


@pytest.fixture
def stage() -> VQModel:
    return load_model(golden.checkpoint("vqmodel_f2"))


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) for key, value in one.state_dict().items()
    )


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("vqmodel_f2", VQModel), ("gumbelvq_f2", VQModel), ("net2net_class", Net2NetTransformer)]
)
def test_a_saved_model_opens_again(name, kind, tmp_path):
    model = load_model(golden.checkpoint(name))
    folder = model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for found in (kind.from_pretrained(folder), load_model(folder), load_model(folder / "model.safetensors")):
        assert type(found) is type(model) and not found.training and same_weights(found, model)
        assert found.config["model"]["target"] == model.config["model"]["target"]


def test_nothing_of_this_machine_is_published(stage, tmp_path):
    stage.config["data"] = {
        "name": "folder",
        "path": "/home/me/pictures",
        "validation_path": "/home/me/more",
        "size": 32,
    }
    stage.config["training"] = {"steps": 3}
    stage.config["model"]["params"]["ckpt_path"] = "/home/me/last.ckpt"
    stage.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["data"] == {"name": "folder", "size": 32} and "training" not in saved
    assert not any(b"/home/me" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_model_made_by_hand_needs_its_config(tmp_path):
    made = load_model(golden.checkpoint("vqmodel_f2"))
    config = {"model": made.config["model"]}
    del made.config
    with pytest.raises(UserError, match="config: got none for a VQModel"):
        made.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert same_weights(VQModel.from_pretrained(made.save_pretrained(tmp_path / "new", config=config)), made)


def test_the_card_says_what_the_model_is_and_what_was_measured(tmp_path):
    prior = load_model(golden.checkpoint("net2net_class"))
    card = (prior.save_pretrained(tmp_path / "birds", figures=FIGURES) / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "tamingfast" and about["pipeline_tag"] == "unconditional-image-generation"
    metrics = {each["type"]: each["value"] for each in about["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"l1": 0.25, "psnr": 21.5, "nats_per_token": 3.25, "frechet_distance": 7.5}
    assert "# birds" in text and "| PSNR, dB | 21.5 |" in text and "12 image files as 32x32" in text
    assert f"{prior.first_stage_model.n_embed} values" in text
    (tmp_path / "birds" / "README.md").write_text("my own words")
    prior.save_pretrained(tmp_path / "birds")
    assert (tmp_path / "birds" / "README.md").read_text() == "my own words"


def test_another_library_s_config_is_not_taken_for_ours(stage, tmp_path, caplog):
    stage.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "other", "hidden_size": 8}')
    assert "inferred" not in caplog.text
    assert same_weights(load_model(tmp_path), stage) and "its architecture is inferred" in caplog.text


def test_the_class_must_fit(stage, tmp_path):
    stage.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="got a VQModel, expected a Net2NetTransformer"):
        Net2NetTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "unreadable JSON"), ("[1]", "no mapping"), ('{"model": {"target": "os.system"}}', "which is not run")],
)
def test_a_damaged_config_is_refused(stage, tmp_path, text, said):
    stage.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["owner/name", "owner/name@v1.0", "owner/name/vq.pt", "o-1/n.a_m-e@abc/vae/x.safetensors"]
)
def test_names_of_repositories(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repositories.names_repository(name) and repositories.names_repository(Path(name))
    Path(name.partition("/")[0]).mkdir()  # a directory in which something was misspelt
    assert not repositories.names_repository(name)


@pytest.mark.parametrize(
    "name", ["name", "/owner/name", "../name", "owner/", "a b/name", "owner/name@", ".hidden/name", ""]
)
def test_other_names_are_paths(name):
    assert not repositories.names_repository(name)


def test_without_the_package_it_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("inspect", "owner/name", names="owner/name")


def test_importing_the_package_does_not_import_the_library():
    code = "import sys, tamingfast; tamingfast.VQModel; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_server.Hub]:
    """A server, an empty cache, and a directory in which no name is a path."""
    library = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub speaks with the Hub")
    monkeypatch.setattr(library, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "0")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with hub_server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_repository_is_a_model(stage, server, tmp_path):
    server.add("them/photos", stage.save_pretrained(tmp_path / "saved"))
    assert same_weights(load_model("them/photos"), stage)
    assert same_weights(VQModel.from_pretrained("them/photos", revision=server.sha("them/photos")), stage)
    assert same_weights(VQModel.from_pretrained("them/photos", cache_dir=tmp_path / "other"), stage)
    assert (tmp_path / "other").is_dir()
    assert same_weights(load_model(f"them/photos@{server.sha('them/photos')}/model.safetensors"), stage)
    assert tasks.inspect("them/photos")["model"] == stage.config["model"]["target"]
    assert not [asked for asked in server.requests if "README" in asked]  # only what a model needs


def test_commands_take_repositories(stage, server, tmp_path):
    server.add("them/photos", stage.save_pretrained(tmp_path / "saved"))
    Image.new("RGB", (32, 32), (10, 200, 30)).save("photo.png")
    for name, model in (("a.png", "them/photos"), ("b.png", tmp_path / "saved")):
        assert run("reconstruct", model, "photo.png", "--out", name, "--device", "cpu") == 0
    assert (pixels_of("a.png") == pixels_of("b.png")).all()


def test_safetensors_come_before_pickles(stage, server, tmp_path):
    folder = stage.save_pretrained(tmp_path / "saved")
    (folder / "model.ckpt").write_bytes(golden.checkpoint("vqmodel_f2").read_bytes())
    server.add("them/both", folder)
    load_model("them/both")
    assert not [asked for asked in server.requests if asked.endswith(".ckpt")]
    run_of_theirs = tmp_path / "run"
    (run_of_theirs / "checkpoints").mkdir(parents=True)
    (run_of_theirs / "configs").mkdir()
    (run_of_theirs / "checkpoints" / "last.ckpt").write_bytes(golden.checkpoint("vqmodel_f2").read_bytes())
    (run_of_theirs / "configs" / "model.yaml").write_bytes(golden.path("vqmodel_f2.yaml").read_bytes())
    server.add("them/run", run_of_theirs)
    assert same_weights(load_model("them/run"), stage)


def test_the_cache_serves_without_a_network(stage, server, tmp_path, monkeypatch):
    server.add("them/photos", stage.save_pretrained(tmp_path / "saved"))
    load_model("them/photos")
    server.requests.clear()
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "1")
    assert same_weights(load_model("them/photos"), stage)
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "0")
    assert same_weights(VQModel.from_pretrained("them/photos", local_files_only=True), stage)
    assert not server.requests
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert same_weights(load_model("them/photos"), stage)


def test_what_cannot_be_had_is_one_sentence(stage, server, tmp_path, monkeypatch):
    server.add("them/photos", stage.save_pretrained(tmp_path / "saved"))
    server.add("them/closed", tmp_path / "saved")
    server.gated.add("them/closed")
    server.repositories["them/words"] = {"README.md": b"nothing else"}
    for name, said in {
        "them/nothing": "neither a file here nor a repository",
        "them/closed": "accept them on its page",
        "them/photos@v9": "a revision that the repository lacks",
        "them/photos/other.safetensors": "a file that the repository lacks",
        "them/words": "a repository without weights",
    }.items():
        assert said in refused("inspect", name, names=name)
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "1")
    server.requests.clear()
    assert "TAMINGFAST_OFFLINE is 1" in refused("inspect", "them/unseen", names="them/unseen")
    with pytest.raises(UserError, match="TAMINGFAST_OFFLINE is 1"):
        stage.push_to_hub("me/mine")
    assert not server.requests
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "an answer of the Hub" in refused("inspect", "them/unseen", names="them/unseen")
    with pytest.raises(UserError, match="an answer of the Hub"):
        stage.push_to_hub("me/mine", token="hf_x")


def test_the_library_s_own_offline_mode(tmp_path):
    """Its variables are read when it is imported."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub speaks with the Hub")
    code = f"""
import os
os.environ |= {{"HF_HUB_OFFLINE": "1", "TAMINGFAST_OFFLINE": "", "HF_HOME": {str(tmp_path)!r}}}
from tamingfast import UserError, load_model
try:
    load_model("them/unseen")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "HF_HUB_OFFLINE is 1" in done.stdout and done.stdout.count("\n") == 1


def test_a_pushed_model_comes_back(stage, server):
    url = stage.push_to_hub("me/mine", figures=FIGURES, private=True, token="hf_x", commit_message="First")
    assert url.startswith(f"{server.url}/me/mine/commit/") and server.commits[0]["summary"] == "First"
    assert sorted(server.repositories["me/mine"]) == ["README.md", "config.json", "model.safetensors"]
    card = server.repositories["me/mine"]["README.md"].decode()
    assert "# me/mine" in card and 'load_model("me/mine")' in card and "21.5" in card
    assert same_weights(VQModel.from_pretrained("me/mine"), stage)
    with pytest.raises(UserError, match="repository: got 'mine', expected owner/name"):
        stage.push_to_hub("mine")


def test_the_command_that_pushes(stage, server, tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(FIGURES | {"machine": MACHINE}))
    words = ["--figures", tmp_path / "report.json", "--private"]
    assert run("push", golden.checkpoint("vqmodel_f2"), "me/mine", *words) == 0
    assert f"pushed: {server.url}/me/mine/commit/" in capsys.readouterr().out
    assert sorted(server.repositories["me/mine"]) == ["README.md", "config.json", "model.safetensors"]
    assert "21.5" in server.repositories["me/mine"]["README.md"].decode()
    assert same_weights(load_model("me/mine"), stage)


def test_a_transformer_and_its_first_stage_are_pushed_as_one(server, tmp_path):
    gpt = llamagen.copied_to(tmp_path)
    torch.manual_seed(0)
    first = FAMILIES["LlamaGen VQ"]["file"](tmp_path)
    codes = load_model(gpt).config.vocab_size
    held = torch.load(first.path, weights_only=False)
    held["model"]["quantize.embedding.weight"] = torch.randn(codes, held["model"]["quantize.embedding.weight"].shape[1])
    torch.save(held, first.path)
    (tmp_path / "config.json").rename(tmp_path / "gpt.json")
    (tmp_path / "gpt").mkdir()
    gpt = gpt.rename(tmp_path / "gpt" / "model.pt")
    (tmp_path / "gpt.json").rename(tmp_path / "gpt" / "config.json")
    assert run("push", gpt, "me/pair", "--first-stage", first.path) == 0
    for name, model in (("a.png", ["me/pair"]), ("b.png", [gpt, "--first-stage", first.path])):
        assert run("sample", *model, "-n", 1, "--class", 2, "--cfg", 2, "--out", name, "--device", "cpu") == 0
    assert (pixels_of("a.png") == pixels_of("b.png")).all()


def test_what_cannot_be_pushed_is_one_sentence(server, tmp_path, monkeypatch):
    model = golden.checkpoint("vqmodel_f2")
    for name in ("mine", "me/mine@v1", "me/mine/part", "../mine", ""):
        refused("push", model, name, names="repository")
    refused("push", tmp_path / "none", "me/mine", names="none")
    for text in ("{", "[]", '{"data": 3}', json.dumps({"data": "x", "machine": MACHINE, "likelihood": {"odd": 1}})):
        (tmp_path / "f.json").write_text(text)
        said = refused("push", model, "me/mine", "--figures", tmp_path / "f.json", names="f.json")
        assert "the JSON that `tamingfast evaluate --out` wrote" in said
    assert not server.requests
    server.gated.add("me/closed")
    assert "hf auth login" in refused("push", model, "me/closed", names="me/closed")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "expected an answer of the Hub" in refused("push", model, "me/mine", names="me/mine")
    monkeypatch.setenv("TAMINGFAST_OFFLINE", "1")
    assert "TAMINGFAST_OFFLINE is 1" in refused("push", model, "me/mine", names="me/mine")
    assert not server.repositories
