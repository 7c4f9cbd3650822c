"""Our models against outputs of the reference implementation, loaded from its own checkpoints and configs."""

from __future__ import annotations

import golden
import pytest
import torch
from torch.testing import assert_close

import tamingfast
from tamingfast.checkpoints.config import instantiate_from_config, load_yaml
from tamingfast.checkpoints.weights import load_into, read_state_dict
from tamingfast.models.vqgan import ADAM_BETAS

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
FIRST_STAGES = ["vqmodel_f2", "vqmodel_f8_rect", "vqsegmentation_f2"]
PRIORS = ["net2net_uncond", "net2net_class", "net2net_seg", "net2net_coord", "net2net_unmasked"]


def tensors(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in golden.arrays(name).items() if value.dtype.kind in "fiu"}


def as_grid(indices: torch.Tensor, quant: torch.Tensor) -> torch.Tensor:
    return indices.view(quant.shape[0], *quant.shape[2:])


@pytest.mark.parametrize("name", FIRST_STAGES)
@torch.no_grad()
def test_first_stage(name):
    model, expected = tamingfast.load_model(golden.checkpoint(name)), tensors(name)
    quant, codebook_loss, (_, _, indices) = model.encode(expected["x"])
    assert_close(indices.view(len(expected["x"]), -1), expected["indices"])
    assert_close(quant, expected["quant"], **TOLERANCE)
    assert_close(codebook_loss, expected["codebook_loss"], **TOLERANCE)
    assert_close(model.decode(quant), expected["reconstruction"], **TOLERANCE)
    assert_close(model(expected["x"])[0], expected["reconstruction"], **TOLERANCE)
    decoded = model.decode_code(as_grid(expected["indices"], quant))
    assert_close(decoded, expected["decode_from_indices"], **TOLERANCE)


@torch.no_grad()
def test_gumbel_first_stage():
    model, expected = tamingfast.load_model(golden.checkpoint("gumbelvq_f2")), tensors("gumbelvq_f2")
    logits = model.quantize.proj(model.encode_to_prequant(expected["x"]))
    assert_close(logits, expected["logits"], **TOLERANCE)
    b, _, h, w = logits.shape
    assert_close(logits.argmax(1).view(b, -1), expected["indices"])
    quant = model.quantize.get_codebook_entry(expected["indices"].view(-1), (b, h, w, model.embed_dim))
    assert_close(quant, expected["quant"], **TOLERANCE)
    assert_close(model.decode(quant), expected["reconstruction"], **TOLERANCE)
    assert_close(model.decode_code(as_grid(expected["indices"], quant)), expected["reconstruction"], **TOLERANCE)
    # Evaluation draws Gumbel noise, but a code is always one entry of the codebook.
    quant, _, (_, _, indices) = model.encode(expected["x"])
    assert_close(quant, model.quantize.get_codebook_entry(indices.view(-1), (b, h, w, model.embed_dim)))


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_prior(name):
    model, expected = tamingfast.load_model(golden.checkpoint(name)), tensors(name)
    quant, z_indices = model.encode_to_z(expected["x"])
    _, c_indices = model.encode_to_c(expected["c"])
    assert_close(z_indices, expected["z_indices"])
    assert_close(c_indices, expected["c_indices"])
    logits, target = model(expected["x"], expected["c"])
    assert_close(logits, expected["logits"], **TOLERANCE)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert_close(loss, expected["loss"], **TOLERANCE)
    greedy = model.sample(z_indices[:, :0], c_indices, z_indices.shape[1], sample=False)
    assert_close(greedy, expected["greedy_indices"])
    assert_close(model.decode_to_img(greedy, quant.shape), expected["greedy_image"], **TOLERANCE)


def test_segmentation_loss():
    expected = tensors("vqsegmentation_loss")
    loss = instantiate_from_config({"target": "taming.modules.losses.segmentation.BCELossWithQuant"})
    value, log = loss(expected["codebook_loss"], expected["x"], expected["reconstruction"], split="train")
    assert_close(value, expected["loss"], **TOLERANCE)
    assert set(log) == {"train/total_loss", "train/bce_loss", "train/quant_loss"}


def test_vqgan_training_by_hand():
    """The original's recipe with the drop-in API: both optimizers in turn, each on a fresh forward pass."""
    recorded = golden.arrays("vqgan_training")
    model = instantiate_from_config(load_yaml(golden.path("vqgan_training.yaml"))["model"]).train()
    load_into(model, read_state_dict(golden.checkpoint("vqgan_training")), "golden")
    model.learning_rate = float(recorded["lr"])
    optimizers, _ = model.configure_optimizers()
    assert [optimizer.defaults["betas"] for optimizer in optimizers] == [ADAM_BETAS, ADAM_BETAS]
    batch = {"image": torch.as_tensor(recorded["x"]).permute(0, 2, 3, 1)}
    columns = ["train/aeloss", "train/discloss", "train/d_weight", "train/g_loss", "train/nll_loss", "train/quant_loss"]
    for step, expected in enumerate(recorded["history"]):
        model.global_step = step
        for index, optimizer in enumerate(optimizers):
            loss = model.training_step(batch, 0, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen = torch.tensor([float(model.logged[column]) for column in columns], dtype=torch.float64)
        assert_close(seen, torch.as_tensor(expected), **TOLERANCE)


def test_transformer_training_by_hand():
    recorded = golden.arrays("transformer_training")
    model = instantiate_from_config(load_yaml(golden.path("transformer_training.yaml"))["model"]).train()
    load_into(model, read_state_dict(golden.checkpoint("transformer_training")), "golden")
    model.learning_rate = float(recorded["lr"])
    optimizer = model.configure_optimizers()
    batch = {"image": torch.as_tensor(recorded["x"]).permute(0, 2, 3, 1)}
    seen = []
    for _ in recorded["loss"]:
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert_close(torch.tensor(seen, dtype=torch.float64), torch.as_tensor(recorded["loss"]), **TOLERANCE)
    assert all(parameter.grad is None for parameter in model.first_stage_model.parameters())


@pytest.mark.parametrize("name", [name for name in golden.arrays("permuters") if not name.startswith("Identity")])
def test_ordering(name):
    from tamingfast.models import orderings

    kind, side = name.split("_")
    permuter = getattr(orderings, kind)(int(side), int(side))
    expected = torch.as_tensor(golden.arrays("permuters")[name])
    assert_close(permuter.forward_shuffle_idx, expected)
    x = torch.arange(int(side) ** 2)[None] * 3
    assert_close(permuter(permuter(x), reverse=True), x)
    assert_close(permuter(x), x[:, expected])
