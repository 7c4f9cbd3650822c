"""The CPU engine and the bands run the networks of all families, or leave them to torch for a reason."""

from __future__ import annotations

import logging

import pytest
import torch
from family_files import FAMILIES

import tamingfast
from tamingfast.engines import bands, first_stage
from tamingfast.errors import UserError

#: Whose encoder and decoder the engine has no block for, and why; None where a network does not describe its layers.
REFUSED = {
    ("latent-diffusion VQ", "plain"): (),
    ("latent-diffusion VQ", "without attention"): (),
    ("LlamaGen VQ", "file"): (),
    ("Open-MAGVIT2", "raw"): ("decoder",),
    ("diffusers VQModel", "of 2022"): (),
    ("diffusers VQModel", "MoVQ"): ("decoder",),
    ("diffusers VQModel", "folder"): ("encoder", "decoder"),  # norms of 24 channels
    ("MaskGIT-VQGAN", "file"): ("encoder", "decoder"),
    ("vqgan-jax", "without convolutions"): (),
}


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    x = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return {"encoder": x, "decoder": model.decoder_input(model.quantised(x)[0])}


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_the_engine_runs_them_or_says_why_not(family, name, tmp_path, caplog):
    made = FAMILIES[family][name](tmp_path)
    model = tamingfast.load_model(made.path, made.config)
    first_stage._logged.cache_clear()
    for side, x in inputs(model).items():
        network = getattr(model, side)
        with torch.no_grad():
            whole = network(x)
        if side not in REFUSED[family, name]:
            found = first_stage.run(network, x, engine="native")
            torch.testing.assert_close(found, whole, atol=2e-5, rtol=2e-5)
            continue
        with pytest.raises(UserError, match="engine: got 'native', which cannot run here"):
            first_stage.run(network, x, engine="native")
        caplog.clear()
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            first_stage._logged.cache_clear()
            for _ in range(2):
                torch.testing.assert_close(first_stage.forward(network, x), whole, atol=2e-5, rtol=2e-5)
        assert len(caplog.records) == 1 and "torch" in caplog.text


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_bands_equal_the_whole(family, name, tmp_path):
    made = FAMILIES[family][name](tmp_path)
    model = tamingfast.load_model(made.path, made.config)
    for side, x in inputs(model).items():
        network = getattr(model, side)
        if not first_stage.describes(network):
            continue
        with torch.no_grad():
            whole = network(x)
        ran = 0
        for memory in (1 << 19, 3 << 19, 1 << 23):
            try:
                found = bands.run(network, x, memory=memory)
            except UserError:  # a block that runs whole needs more
                continue
            ran += 1
            torch.testing.assert_close(found, whole, atol=2e-5, rtol=2e-5)
        assert ran


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 8), (7, 7)])
def test_padding_on_all_sides_before_downsampling(size):
    from tamingfast.models.autoencoder import Encoder

    torch.manual_seed(0)
    options = {"ch": 16, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (), "in_channels": 3}
    encoder = Encoder(**options, resolution=8, z_channels=4, double_z=False, symmetric=True, num_groups=4).eval()
    x = torch.randn(1, 3, 2 * size[0], 2 * size[1])
    with torch.no_grad():
        whole = encoder(x)
    assert whole.shape[2:] == size
    torch.testing.assert_close(first_stage.run(encoder, x, engine="native"), whole, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(bands.run(encoder, x, memory=1 << 18), whole, atol=2e-5, rtol=2e-5)
