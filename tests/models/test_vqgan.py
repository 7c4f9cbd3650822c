"""First stages beyond the recorded outputs of the reference."""

from __future__ import annotations

import pytest
import torch
from networks import DDCONFIG, DUMMY
from torch.testing import assert_close

from tamingfast.engines import first_stage
from tamingfast.errors import UserError
from tamingfast.models.autoencoder import AttnBlock, Decoder, Encoder
from tamingfast.models.discriminator import ActNorm, NLayerDiscriminator
from tamingfast.models.vqgan import EMAVQ, LambdaWarmUpCosineScheduler, VQModel


def test_sides_that_f_does_not_divide_are_cut():
    model = VQModel({**DDCONFIG, "ch_mult": [1, 1, 1]}, DUMMY, n_embed=12, embed_dim=4)
    assert model.encoder(torch.zeros(1, 3, 11, 8)).shape == (1, 4, 2, 2)
    assert model(torch.zeros(1, 3, 11, 8))[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 16), (16,)])
def test_decode_code_shapes(shape):
    model = VQModel(DDCONFIG, DUMMY, n_embed=12, embed_dim=4)
    out = model.decode_code(torch.zeros(shape, dtype=torch.int64))
    assert out.shape[2:] == ((8, 12) if len(shape) == 3 else (8, 8))
    with pytest.raises(ValueError, match="got 15 indices, expected a square number"):
        model.decode_code(torch.zeros(1, 15, dtype=torch.int64))


def test_attributes_that_other_code_reads():
    model = VQModel({**DDCONFIG, "ch_mult": [1, 1, 1]}, DUMMY, n_embed=12, embed_dim=4)
    assert model.decoder.num_resolutions == model.encoder.num_resolutions == 3
    assert model.decoder.z_shape == (1, 4, 2, 2)
    assert model.encoder.resolution == 8 and model.encoder.in_channels == 3


def test_ema_model_can_be_trained_and_decoded():
    model = EMAVQ(DDCONFIG, DUMMY, n_embed=12, embed_dim=4)
    model.learning_rate = 1e-3
    (optimizer,), _ = model.configure_optimizers()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in model.quantize.parameters()}
    assert model.decode_code(torch.zeros(2, 4, 6, dtype=torch.int64)).shape == (2, 3, 8, 12)


def test_temperature_schedule():
    schedule = LambdaWarmUpCosineScheduler(10, lr_min=0.1, lr_max=1.0, lr_start=0.0, max_decay_steps=110)
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(110) == schedule(500) == pytest.approx(0.1)


def test_actnorm_starts_by_standardising():
    layer = ActNorm(3)
    x = torch.randn(8, 3, 4, 4) * 5 + 2
    y = layer(x)
    assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert_close(layer(y, reverse=True), x, atol=1e-4, rtol=1e-4)
    patches = NLayerDiscriminator(use_actnorm=True, ndf=8, n_layers=1)(torch.randn(2, 3, 16, 16))
    assert patches.shape == (2, 1, 6, 6)


class TestNoAttention:
    """``attn_type: none``."""

    def networks(self, **more):
        described = {**DDCONFIG, "attn_resolutions": [4, 8], **more}
        return Encoder(**described), Decoder(**described)

    def test_there_is_none(self):
        for network in self.networks(attn_type="none"):
            assert not any(isinstance(module, AttnBlock) for module in network.modules())
        for network in self.networks():
            assert sum(isinstance(module, AttnBlock) for module in network.modules()) >= 2

    def test_what_is_left_is_the_rest_of_the_network(self):
        """The blocks of a whole network one after the other, without those of attention."""
        for network, whole in zip(self.networks(attn_type="none"), self.networks(), strict=True):
            state = {name: value for name, value in whole.state_dict().items() if ".attn" not in name}
            network.load_state_dict(state)
            x = torch.randn(1, whole.conv_in.in_channels, 8, 8)
            levels = list(whole.down) if hasattr(whole, "down") else list(reversed(whole.up))
            parts = [part for level in levels for part in level.parts()]
            middle = whole.mid.parts()
            h = whole.conv_in(x)
            for part in [*parts, *middle] if hasattr(whole, "down") else [*middle, *parts]:
                h = h if isinstance(part, AttnBlock) else part(h)
            expected = whole.conv_out(whole.norm_out(h))
            assert_close(network(x), expected)
            with torch.no_grad():
                assert_close(first_stage.forward(network.eval(), x), expected, rtol=1e-4, atol=1e-4)  # by the engine

    def test_another_word(self):
        with pytest.raises(UserError, match=r"^ddconfig.attn_type: got 'linear', expected 'vanilla' or 'none'"):
            self.networks(attn_type="linear")
