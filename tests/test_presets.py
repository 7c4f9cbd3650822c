"""The table of presets: complete, its figures computed from the configs, in the help and in the docs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tamingfast import presets
from tamingfast.checkpoints.config import instantiate_from_config
from tamingfast.engines import layers
from tamingfast.models.gpt import GPT

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in (ROOT / "tamingfast" / "configs").glob("*.yaml")}
#: Of data sets that have one of their own.
SIDES = {"cifar10": 32}


def computed(config: dict[str, Any]) -> tuple[int | None, int | None, float, float]:
    """Side, factor, millions of parameters, and 1e15 operations of all steps."""
    params, training = dict(config["model"]["params"]), config["training"]
    images = training["steps"] * training["batch_size"]
    if "ddconfig" not in params:
        with torch.device("meta"):
            gpt = GPT(1024, 256, **params["transformer_config"]["params"])
        linear = sum(module.weight.numel() for module in gpt.modules() if isinstance(module, nn.Linear))
        # Two operations per weight and per channel of each visible pair's two products; the backward pass takes twice
        # as many as the forward pass.
        pairs = 256 * 257 // 2
        operations = 6 * (256 * linear + 2 * pairs * gpt.config.n_layer * gpt.config.n_embd)
        return None, None, parameters(gpt), images * operations / 1e15
    with torch.device("meta"):
        model = instantiate_from_config(
            {"target": config["model"]["target"], "params": params | {"lossconfig": {"target": "torch.nn.Identity"}}}
        )
    side, channels = config["data"].get("size") or SIDES[config["data"]["name"]], params["ddconfig"]["in_channels"]
    latents = (params["ddconfig"]["z_channels"], side // model.factor, side // model.factor)
    operations = 6 * (work(model.encoder.layers(), (channels, side, side)) + work(model.decoder.layers(), latents))
    return side, model.factor, parameters(model), images * operations / 1e15


def work(network: list[layers.Layer], shape: layers.Shape) -> int:
    """Multiply-adds of the layers."""
    return sum(
        layers.work(layer, after) for layer, after in zip(network, layers.shapes(network, shape)[1:], strict=True)
    )


def parameters(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def test_every_preset_is_in_the_table():
    assert set(presets.PRESETS) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_figures_follow_from_the_config(name):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS[name]), resolve=True)
    side, factor, millions, operations = computed(config)
    preset = presets.PRESETS[name]
    assert (preset.side, preset.factor) == (side, factor)
    assert preset.stage == ("prior" if side is None else "vqgan")
    assert preset.parameters == pytest.approx(millions, rel=5e-3)
    assert preset.operations == pytest.approx(operations, rel=5e-3)


@pytest.mark.parametrize(
    ("hours", "text"), [(0.001, "3.6 s"), (0.05, "3 min"), (3.14159, "3.1 h"), (720, "30 days"), (2000, "83 days")]
)
def test_durations_have_two_digits(hours, text):
    assert presets.duration(hours) == text


def test_the_docs_show_the_table():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert presets.markdown() in page and presets.NOTE.replace("\n", " ") in page.replace("\n", " ")


@pytest.mark.parametrize(("words", "shown"), [(["train"], 2), (["train", "vqgan"], 1), (["train", "prior"], 1)])
def test_the_help_shows_the_table_without_torch(words, shown):
    code = (
        "import sys; from tamingfast import cli\n"
        f"try: cli.main({[*words, '--help']!r})\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert ("folder_vqgan" in done.stdout) + ("gpt2_medium" in done.stdout) == shown
    assert presets.NOTE in done.stdout
