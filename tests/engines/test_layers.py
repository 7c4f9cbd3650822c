"""The lists of layers by which encoders and decoders describe themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tamingfast.engines import layers
from tamingfast.models.autoencoder import Decoder, Encoder

GEOMETRY = dict(
    ch=32, in_channels=3, out_ch=3, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32,
    z_channels=4, double_z=False,
)  # fmt: skip


def network(kind: type, **options) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**GEOMETRY | options)
    for parameter in model.parameters():  # norms and biases with an effect
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"resamp_with_conv": False}, {"give_pre_end": True}], ids=str)
@pytest.mark.parametrize(("kind", "shape"), [(Decoder, (4, 7, 11)), (Encoder, (3, 33, 50))])
def test_a_network_equals_its_layers_and_names_all_convolutions(kind, shape, options):
    model = network(kind, **options)
    x = torch.randn(2, *shape)
    described, y = model.layers(), x
    for layer, after in zip(described, layers.shapes(described, shape)[1:], strict=True):
        y = layer(y)
        assert tuple(y.shape[1:]) == after
    assert torch.equal(model(x), y)
    named = [conv for layer in described for conv in layer.convolutions]
    named += [model.conv_out] if "give_pre_end" in options and kind is Decoder else []
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {id(conv) for conv in named} == {id(conv) for conv in found} and len(named) == len(found)


@torch.no_grad()
def test_a_description_is_all_that_an_engine_needs():
    seen = set()
    for layer in network(Decoder).layers() + network(Encoder).layers():
        x = torch.randn(1, layer.convolutions[0].in_channels, 6, 10)
        assert_close(computed(layer, x), layer(x))
        seen.add(type(layer))
    assert len(seen) == 5


def computed(layer: layers.Layer, x: torch.Tensor) -> torch.Tensor:
    """The layer by plain functions of torch, from the fields of its description."""
    match layer:
        case layers.Convolution():
            return convolved(layer.conv, x if layer.norm is None else normalised(layer.norm, x))
        case layers.Residual():
            h = convolved(layer.conv1, normalised(layer.norm1, x))
            h = convolved(layer.conv2, normalised(layer.norm2, h))
            return h + (x if layer.shortcut is None else convolved(layer.shortcut, x))
        case layers.Attention():
            h = normalised(layer.norm, x)
            q, k, v = (convolved(conv, h).flatten(2) for conv in (layer.query, layer.key, layer.value))
            weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
            return x + convolved(layer.projection, (v @ weights.transpose(1, 2)).view(x.shape))
        case layers.Upsample():
            return convolved(layer.conv, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        case layers.Downsample():
            return convolved(layer.conv, F.pad(x, layers.DOWNSAMPLE_PADDING))


def convolved(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def normalised(norm: layers.Norm, x: torch.Tensor) -> torch.Tensor:
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return y * y.sigmoid() if norm.silu else y
