"""Names of the original and of earlier versions, and the configs that contain them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import tamingfast
from tamingfast.checkpoints import compat, config, targets
from tamingfast.errors import UserError
from tamingfast.renamed import RENAMED, new_name


@pytest.mark.parametrize(
    ("name", "home"),
    [(f"{module}.{name}", home) for module, names in compat.NAMES.items() for name, home in names.items()],
)
def test_every_name_of_the_original_resolves(name, home):
    module, _, member = home.partition(":")
    assert new_name(module) == module  # today's name, not an older one
    assert compat.resolve(name) is getattr(importlib.import_module(module), member)


@pytest.mark.parametrize("old", RENAMED)
def test_every_old_module_name_is_the_new_module(old):
    new = importlib.import_module(f"tamingfast.{RENAMED[old]}")
    assert importlib.import_module(f"tamingfast.{old}") is new
    assert new.__name__ == new.__spec__.name == f"tamingfast.{RENAMED[old]}"
    assert RENAMED[old] not in RENAMED  # no chains


@pytest.mark.parametrize(
    "target",
    [
        "tamingfast.models.vqgan.VQModel", "tamingfast.losses.DummyLoss", "tamingfast.orderings.SpiralOut",
        "tamingfast.models.conditioning.Labelator", "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    ],
)  # fmt: skip
def test_networks_under_all_their_names_are_allowed(target):
    targets.check_targets({"target": target}, "model")


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "torch.nn.Linear", "main.instantiate_from_config", "taming.modules.losses.vqperceptual.F",
        "tamingfast.checkpoints.convert", "tamingfast.backends.pick_device", "tamingfast.models.gpt.sample",
        "tamingfast.models.gpt.GPTConfig",
    ],
)  # fmt: skip
def test_all_else_is_refused(target):
    with pytest.raises(UserError, match=f"target: got '{target}', which is not run"):
        targets.check_targets({"params": [{"target": target}]}, "model")


def test_install_in_a_new_process():
    code = """
import tamingfast.checkpoints.compat; tamingfast.checkpoints.compat.install(); tamingfast.checkpoints.compat.install()
from taming.models.vqgan import VQModel, GumbelVQ
import taming.modules.transformer.mingpt as mingpt
from taming.models import cond_transformer
import tamingfast, importlib, importlib.util
assert VQModel is tamingfast.VQModel and mingpt.GPT is tamingfast.GPT
assert cond_transformer.Net2NetTransformer is tamingfast.Net2NetTransformer
quantize = importlib.import_module("taming.modules.vqvae.quantize")
assert quantize.VectorQuantizer2 is tamingfast.VectorQuantizer
try:
    from taming.models.vqgan import Nonsense
except ImportError as error:
    print("refused:", error)
assert importlib.util.find_spec("taming") is not None
from taming.models import cond_transformer, vqgan
from taming.modules.transformer.mingpt import sample_with_past
from taming.modules.losses.vqperceptual import *
assert LPIPS and NLayerDiscriminator and weights_init and hinge_d_loss and F
from taming.modules.diffusionmodules.model import Encoder, Decoder, Normalize
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused:")


def test_public_names():
    for name in tamingfast.__all__:
        assert getattr(tamingfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = tamingfast.Nonsense


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("taming.models.vqgan.VQModell", "did you mean 'taming.models.vqgan.VQModel'"),
        ("taming.nothing.Here", "expected a name of the original that has a counterpart"),
        ("nosuchpackage.Thing", "cannot be imported"),
        ("Thing", "cannot be imported"),
    ],
)
def test_unknown_targets(target, match):
    with pytest.raises(UserError, match=match):
        config.instantiate_from_config({"target": target})


def test_unknown_parameters_name_the_nearest():
    wrong = {
        "target": "taming.modules.transformer.mingpt.GPT",
        "params": {"vocab_size": 4, "block_size": 4, "n_layers": 1},
    }
    with pytest.raises(UserError, match="n_layers.*did you mean 'n_layer'"):
        config.instantiate_from_config(wrong)
    with pytest.raises(UserError, match="'target'"):
        config.instantiate_from_config({"params": {}})


def test_yaml_errors(tmp_path):
    with pytest.raises(UserError, match="none.yaml: got no file, expected a YAML config"):
        config.load_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    with pytest.raises(UserError, match="bad.yaml: got unreadable YAML"):
        config.load_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="list.yaml: got no mapping"):
        config.load_yaml(tmp_path / "list.yaml")
