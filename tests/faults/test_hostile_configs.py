"""Configs of strangers: whatever they name, nothing of it is called, and the refusal is one sentence."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

from tamingfast import UserError, cli, load_model
from tamingfast.checkpoints import convert, save_weights
from tamingfast.checkpoints.config import load_yaml, plain
from tamingfast.checkpoints.weights import read_state_dict
from tamingfast.training import load_config

FUNCTIONS = (
    "os.system", "subprocess.check_output", "builtins.exec", "builtins.eval", "runpy.run_path", "shutil.rmtree",
    "torch.load", "torch.hub.load", "numpy.load", "pickle.loads", "this.s", "antigravity.geohash", "pip.__main__.x",
    "tamingfast.cli.main", "tamingfast.checkpoints.convert.convert", "tamingfast.models.gpt.sample", "main.anything",
    "main.instantiate_from_config", "taming.modules.losses.vqperceptual.F", "importlib.import_module",
    "pathlib.Path", "collections.OrderedDict", "subprocess.Popen", "sched.scheduler", ".os.system", "os", "", "x y",
)  # fmt: skip
STAGE = tiny.VQGAN["model"]
PRIOR = {
    "target": "taming.models.cond_transformer.Net2NetTransformer",
    "params": {
        "first_stage_config": {key: STAGE[key] for key in ("target", "params")},
        "cond_stage_config": {"target": "taming.modules.util.Labelator", "params": {"n_classes": 3}},
        "permuter_config": {"target": "taming.modules.transformer.permuter.Identity"},
        "transformer_config": {
            "target": "taming.modules.transformer.mingpt.GPT",
            "params": {"vocab_size": 16, "block_size": 32, "n_layer": 1, "n_head": 1, "n_embd": 8},
        },
    },
}
ORIGINAL = {
    "target": "main.DataModuleFromConfig",
    "params": {
        "batch_size": 2,
        "train": {"target": "taming.data.custom.CustomTrain", "params": {"size": 8}},
        "validation": {"target": "taming.data.custom.CustomTest", "params": {"size": 8}},
    },
}
PLACES = {
    "model": ("vqgan", {}),
    "model.params.lossconfig": ("vqgan", {}),
    "data.train": ("vqgan", {"data": ORIGINAL["params"]}),
    "data.params.train": ("vqgan", {"data": ORIGINAL}),
    "data.params.validation": ("vqgan", {"data": ORIGINAL}),
    "data.params.test": ("vqgan", {"data": ORIGINAL}),
    "data.params.wrap": ("vqgan", {"data": ORIGINAL}),
    "model.params.first_stage_config": ("prior", {"model": PRIOR}),
    "model.params.first_stage_config.params.lossconfig": ("prior", {"model": PRIOR}),
    "model.params.cond_stage_config": ("prior", {"model": PRIOR}),
    "model.params.permuter_config": ("prior", {"model": PRIOR}),
    "model.params.transformer_config": ("prior", {"model": PRIOR}),
    "model.params.scheduler_config": ("prior", {"model": PRIOR}),
    "model.params.ignore_keys.0": ("vqgan", {}),
}


def placed(place: str, value: object) -> tuple[str, dict]:
    """(stage, config) with ``value`` at a dotted key."""
    stage, changed = PLACES[place]
    config = copy.deepcopy(tiny.VQGAN | {"data": tiny.CROPS} | changed)
    *above, last = place.split(".")
    inside = config
    for key in above:
        inside = inside.setdefault(key, [None] if key == "ignore_keys" else {})
    inside[int(last) if last.isdecimal() else last] = value
    return stage, config


def command(tmp_path: Path, target: str) -> dict:
    marker = tmp_path / "ran"
    params = {"command": f"touch {marker}"} if target == "os.system" else {"args": ["touch", str(marker)]}
    return {"target": target, "params": params}


def refused(capsys, *words: object) -> str:
    assert cli.main([str(word) for word in words]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "mine.run"])
def test_no_place_of_a_config_runs_a_function(place, target, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(f"def run(**options): open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    stage, config = placed(place, command(tmp_path, target))
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    error = refused(capsys, "train", stage, tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert target in error or place.rpartition(".")[2] in error
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", [*FUNCTIONS, 3, None, ["os.system"], {"a": 1}])
def test_only_networks_data_sets_and_schedules_are_built(target, tmp_path):
    _, config = placed("model.params.lossconfig", {"target": target})
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config))
    before = set(sys.modules)
    with pytest.raises(UserError, match="lossconfig"):
        load_config(path)
    assert not {"this", "antigravity", "pip.__main__"} & (set(sys.modules) - before)


@pytest.fixture
def own(tmp_path, monkeypatch, capsys) -> Path:
    """A run that was trained with a class of the user's."""
    (tmp_path / "mine.py").write_text(
        "from tamingfast.models.losses import VQLPIPSWithDiscriminator\nclass Loss(VQLPIPSWithDiscriminator): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", None)
    del sys.modules["mine"]
    config = tiny.config(tiny.VQGAN, steps=1) | {"data": tiny.CROPS}
    config["model"]["params"]["lossconfig"]["target"] = "mine.Loss"
    (tmp_path / "own.yaml").write_text(json.dumps(config))
    words = ["train", "vqgan", tmp_path / "own.yaml", "--out", tmp_path / "run", "--device", "cpu"]
    assert cli.main([str(word) for word in words]) == 0
    del sys.modules["mine"]
    return tmp_path / "run"


def test_a_class_of_the_user_is_named_again_on_opening(own, tmp_path, capsys, monkeypatch):
    resume = ["train", "vqgan", "--resume", "--out", own, "--device", "cpu", "training.steps=2"]
    for words in (resume, ["convert", own, tmp_path / "m.safetensors"], ["reconstruct", own, tmp_path / "x.png"]):
        error = refused(capsys, *words)
        assert (
            "model.params.lossconfig.target: got 'mine.Loss', which is not run" in error
            and "--allow mine.Loss" in error
        )
    assert "mine" not in sys.modules
    with pytest.raises(UserError, match=r"mine\.Loss"):
        load_model(own, allow=("mine.Loss.", "mine", "Loss"))
    assert type(load_model(own, allow=("mine.Loss",)).loss).__name__ == "Loss"
    assert type(load_model(own, allow="mine.Loss").loss).__name__ == "Loss"
    assert cli.main([str(word) for word in (*resume, "--allow", "mine.Loss")]) == 0
    again = ["train", "vqgan", tmp_path / "own.yaml", *resume[2:]]  # the user's own config names it again
    assert cli.main([str(word) for word in again]) == 0
    assert cli.main(["convert", str(own), str(tmp_path / "m.safetensors"), "--allow", "mine.Loss"]) == 0


def test_what_is_allowed_is_a_class_still(own, tmp_path, capsys):
    config = plain(load_yaml(own / "config.yaml"))
    config["model"]["params"]["lossconfig"] = command(tmp_path, "os.system")
    (own / "config.yaml").write_text(json.dumps(config))
    for words in (["train", "vqgan", "--resume", "--out", own], ["convert", own, tmp_path / "m.safetensors"]):
        assert "os.system" in refused(capsys, *words, "--allow", "os.system")
    assert not (tmp_path / "ran").exists()


def test_data_of_a_run_are_not_built_unasked(own, tmp_path, capsys):
    (tmp_path / "data_of_a_stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = plain(load_yaml(own / "config.yaml"))
    config["data"] = {"train": {"target": "data_of_a_stranger.Set"}, "validation": {"target": "data_of_a_stranger.Set"}}
    (own / "config.yaml").write_text(json.dumps(config))
    words = [["encode", own, "--out", tmp_path / "t.safetensors"], ["evaluate", own]]
    words += [["train", "prior", "tiny", "--first-stage", own, "--out", tmp_path / "prior"]]
    for each in words:
        assert "data_of_a_stranger.Set" in refused(capsys, *each, "--allow", "mine.Loss")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}", "x${oc.env:HOME}y", "${oc.env:NONE,${oc.env:HOME}}", "${oc.decode:1}", "${oc.create:{}}",
        "${oc.select:model}", "${oc.dict.keys:model}", "${oc.deprecated:a}", "${ oc.env : HOME }", "${${x}:HOME}",
        "${oc.${x}:HOME}", "${oc['env']:HOME}", "${mine:}", "${", "${a", "${}}${oc.env:HOME}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["file", "override", "run", "beside the weights"])
@pytest.mark.filterwarnings("ignore:register_new_resolver")
def test_resolvers_are_refused_and_not_run(text, where, tmp_path, capsys, monkeypatch):
    from omegaconf import OmegaConf

    if not OmegaConf.has_resolver("mine"):
        OmegaConf.register_new_resolver("mine", lambda *words: pytest.fail("a resolver was run"))
    monkeypatch.setenv("HOME", "a-secret-of-mine")
    config = tiny.VQGAN | {"data": tiny.CROPS}
    hostile = tmp_path / "c.yaml"
    changed = copy.deepcopy(config)
    changed["model"]["params"]["image_key"] = text
    hostile.write_text(json.dumps(config if where == "override" else changed))
    words = ["train", "vqgan", hostile, "--out", tmp_path / "run"]
    if where == "override":
        words.append(f"model.params.image_key={text}")
    elif where == "run":
        (tmp_path / "run").mkdir()
        hostile.rename(tmp_path / "run" / "config.yaml")
        words = ["train", "vqgan", "--resume", "--out", tmp_path / "run"]
    elif where == "beside the weights":
        save_weights(tmp_path / "c.safetensors", {"a": tiny.torch.zeros(1)})
        words = ["convert", tmp_path / "c.safetensors", tmp_path / "out.safetensors"]
    error = refused(capsys, *words)
    assert "image_key" in error or "c.yaml" in error or "config.yaml" in error
    assert "a-secret-of-mine" not in error


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MIRRORS = "a0: text\n" + "".join(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}\n" for i in range(1, 60))
TREES = "a0: [1, 2]\n" + "".join(f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']\n" for i in range(1, 60))


@pytest.mark.parametrize(
    "content",
    [
        "", "#", "3", "text", "- 1", "a: [1", "a: 1\na: 2", "a: 1\n---\nb: 2", "? [1]\n: 2", "<<: 3", "%YAML 9", "\t",
        "a: !!python/object/apply:os.system [touch ran]", "!!python/object/new:os.system [touch ran]",
        "a: !!python/name:os.system", "a: !thing 3", "a: &x [*x]", "a: &x {b: *x}", "a: *x", LAUGHS, MIRRORS, TREES,
        "a: " + "[" * 100 + "]" * 100, "a: " + "[" * 100_000, "[" * 100_000, "{a: " * 100_000, "- " * 50_000,
        "a: [" + "1," * 300_000 + "]", "x" * 2_000_000, "a: " + "9" * 10_000, "a: \0", "a: ${b}", "a: ${a}",
        "a: ${b}\nb: ${a}", "a: {b: '${a}'}", "a: ${b.c}\nb: 3", "a: ${.c}", "a: ${" + ".".join("a" * 5000) + "}",
        "\0\1\2\3", "<!doctype html><html><body>Not found</body></html>", '{"model": ' * 200,
    ],
    ids=lambda content: content[:20],
)  # fmt: skip
def test_text_that_is_no_config(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "\n" not in str(error.value) and ": got " in str(error.value)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("\ufeffa: 1".encode(), {"a": 1}),
        ("a: 1".encode("utf-16"), {"a": 1}),
        (b"a: &x {b: 1}\nc: {<<: *x, d: *x}", {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}),
        ("a: é".encode(), {"a": "é"}),
        ("a: é".encode("latin-1"), None),
        (bytes(range(256)), None),
    ],
)
def test_encodings(content, kept, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    if kept is None:
        with pytest.raises(UserError, match=r"c\.yaml: got"):
            load_yaml(path)
    else:
        assert plain(load_yaml(path)) == kept


def test_many_names_of_classes_are_a_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"data": {"classes": [f"class {number}" for number in range(20_000)]}}))
    assert len(plain(load_yaml(path))["data"]["classes"]) == 20_000


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are files on POSIX only")
def test_pipes_and_directories_are_no_configs(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    opened = threading.Thread(
        target=lambda: [refused(capsys, "train", "vqgan", tmp_path / name, "--out", tmp_path / "run")
                        for name in ("pipe.yaml", "folder.yaml")], daemon=True,
    )  # fmt: skip
    opened.start()
    opened.join(60)
    assert not opened.is_alive()


EMBEDDED = [
    3, None, [], [1], "text", True, {}, {"model": 3}, {"model": None}, {"model": []}, {"model": {"target": 3}},
    {"model": {"target": "taming.models.vqgan.VQModel"}},
    {"model": {"target": "taming.models.vqgan.VQModel", "params": 3}},
    {"model": {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": 3}}},
    {"model": {"target": "taming.models.vqgan.VQModel", "params": {"ddconfig": {"ch": "a", "ch_mult": [10**9]}}}},
    {"model": STAGE | {"params": STAGE["params"] | {"lossconfig": 3}}},
]  # fmt: skip


@pytest.mark.parametrize("config", EMBEDDED, ids=lambda config: json.dumps(config)[:60])
def test_embedded_configs_of_any_shape(config, tmp_path):
    path = tmp_path / "m.safetensors"
    save_weights(path, {"a": tiny.torch.zeros(1)}, {"config": json.dumps(config)})
    with pytest.raises(UserError) as error:
        load_model(path)
    assert "\n" not in str(error.value)


#: Numbers that ask for more than any machine has, one at a time.
HUGE = [
    ("n_layer", 10**9), ("n_embd", 10**9), ("vocab_size", 10**12), ("block_size", 10**12), ("n_layer", 10**300),
    ("num_res_blocks", 10**8), ("ch", 10**9), ("ch_mult", [10**9]), ("ch_mult", [1] * 50_000), ("z_channels", 10**9),
    ("in_channels", 10**12), ("out_ch", 10**12), ("n_embed", 10**12), ("embed_dim", 10**12), ("disc_num_layers", 10**9),
    ("disc_ndf", 10**8), ("colorize_nlabels", 10**12), ("ch_mult", ["a" * 9]), ("ch", "a"), ("ch", [1]),
    ("attn_resolutions", ["a"]), ("n_layer", 1e9), ("n_layer", True), ("num_res_blocks", "many"),
]  # fmt: skip


def enlarged(config: object, key: str, value: object) -> object:
    if isinstance(config, dict):
        own = {name: enlarged(inside, key, value) for name, inside in config.items()}
        holds = {"ddconfig": ("ch",), "colorize_nlabels": ("embed_dim",)}
        return own | ({key: value} if key in own or holds.get(key, ("",))[0] in own else {})
    return config


def quickly(action, seconds: float = 60.0):
    """The error of ``action()``; fails when it takes as long as building something huge."""
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        action()
    assert time.monotonic() - began < seconds
    return str(error.value)


@pytest.fixture(scope="module")
def prior_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    return convert(tiny.runs(folder) / "prior", folder / "prior.safetensors")


@pytest.mark.parametrize(("key", "value"), HUGE, ids=lambda value: str(value)[:20])
def test_numbers_that_the_weights_do_not_bear_out(key, value, prior_file, tmp_path):
    config = load_model(prior_file).config
    loss = {
        "target": STAGE["params"]["lossconfig"]["target"],
        "params": {"disc_start": 0, "disc_num_layers": 1, "disc_ndf": 4},
    }
    config["model"]["params"]["first_stage_config"]["params"]["lossconfig"] = loss
    changed = enlarged(config, key, value)
    assert json.dumps(changed) != json.dumps(config)
    path = tmp_path / "m.safetensors"
    save_weights(path, read_state_dict(prior_file), {"config": json.dumps(changed)})
    error = quickly(lambda: load_model(path))
    assert key in error


@pytest.mark.parametrize(
    ("key", "value"),
    [each for each in HUGE if each[0] not in ("n_layer", "n_embd", "vocab_size", "block_size")],
    ids=lambda value: str(value)[:20],
)
def test_numbers_that_the_memory_does_not_bear(key, value, tmp_path, capsys):
    config = enlarged(tiny.VQGAN | {"data": tiny.CROPS}, key, value)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert key in refused(capsys, "train", "vqgan", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("taming.modules.transformer.permuter.SpiralIn", {"H": 10**6, "W": 10**6}),
        ("taming.modules.vqvae.quantize.EmbeddingEMA", {"num_tokens": 10**12, "codebook_dim": 10**6}),
        ("taming.modules.transformer.mingpt.KMeans", {"ncluster": 10**14}),
        ("taming.modules.util.ActNorm", {"num_features": 10**14}),
        ("taming.modules.diffusionmodules.model.AttnBlock", {"in_channels": 10**9}),
    ],
)
def test_any_class_of_ours_is_measured(target, params, prior_file, tmp_path):
    config = load_model(prior_file).config
    config["model"]["params"]["permuter_config"] = {"target": target, "params": params}
    path = tmp_path / "m.safetensors"
    save_weights(path, read_state_dict(prior_file), {"config": json.dumps(config)})
    assert "permuter_config" in quickly(lambda: load_model(path))
