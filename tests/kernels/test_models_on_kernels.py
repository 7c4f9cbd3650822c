"""Models run on the kernels, and torch.compile captures both in one graph."""

from __future__ import annotations

import pytest
import torch

from tamingfast.models.gpt import GPT
from tamingfast.models.vqgan import VQModel
from tamingfast.ops import backends

pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]
if not backends.interpreted():
    pytestmark.append(pytest.mark.gpu)


def vqgan(**quantizer) -> VQModel:
    levels = {"ch": 32, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": [], "resolution": 8}
    ddconfig = levels | {"double_z": False, "z_channels": 8, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    return VQModel(ddconfig, {"target": "torch.nn.Identity"}, n_embed=10, embed_dim=8, **quantizer)


def of_today(kind: str, **params) -> VQModel:
    return vqgan(quantizer_config={"target": f"tamingfast.models.codebooks.{kind}", "params": params})


def gpt(**options) -> GPT:
    return GPT(11, 12, n_layer=2, n_head=2, n_embd=48, **options)


def step_of_vqgan(model, device, rng):
    quant, loss, (_, _, indices) = model.encode(torch.randn(1, 3, 8, 8, generator=rng).to(device))
    return model.decode(quant).square().mean() + loss, indices


def step_of_gpt(model, device, rng):
    tokens = torch.randint(11, (2, 12), generator=rng).to(device)
    logits, loss = model(tokens, targets=tokens)
    return loss, logits.argmax(-1)


CASES = {
    "VQGAN": (vqgan, step_of_vqgan),
    "VQGAN, channels last": (lambda: vqgan().to(memory_format=torch.channels_last), step_of_vqgan),
    "cosine codes": (lambda: of_today("CosineQuantizer", restart_below=0.5), step_of_vqgan),
    "SimVQ with rotation": (lambda: of_today("SimVQ", gradient="rotation"), step_of_vqgan),
    "GPT": (gpt, step_of_gpt),
    "GPT with a prefix": (lambda: gpt(n_unmasked=5), step_of_gpt),
}


def gradients(case: str, device: torch.device, backend: str | None) -> tuple:
    torch.manual_seed(0)
    build, step = CASES[case]
    model = build().to(device)
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with backends.use(backend), exact:
        loss, choices = step(model, device, torch.Generator().manual_seed(1))
        loss.backward()
    return loss.detach(), choices, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


RARE = {"VQGAN, channels last", "SimVQ with rotation", "GPT"}  # what other tests of kernels cover


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.exhaustive if case in RARE else ()) for case in CASES]
)
def test_a_training_step_equals_that_of_the_definition(device, case):
    loss, choices, grads = gradients(case, device, "triton")
    expected_loss, expected_choices, expected = gradients(case, device, "reference")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert torch.equal(choices, expected_choices)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", ["VQGAN", "GPT with a prefix"])
def test_a_training_step_compiles_into_one_graph(device, case):
    torch.manual_seed(0)
    model = CASES[case][0]().to(device)
    images, tokens = torch.randn(1, 3, 8, 8, device=device), torch.randint(11, (2, 12), device=device)

    def forward(model):
        if isinstance(model, GPT):
            return model(tokens, targets=tokens)[1]
        quant, loss, _ = model.encode(images)
        return model.decode(quant).square().mean() + loss

    parameters = [p for p in model.parameters() if p.requires_grad]
    with backends.use("triton"):
        expected = forward(model)
        expected_grads = torch.autograd.grad(expected, parameters, allow_unused=True)
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
        loss = compiled(model)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for got, true in zip(grads, expected_grads, strict=True):
        assert (got is None) == (true is None)
        if got is not None:
            torch.testing.assert_close(got, true, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
def test_a_training_step_is_captured_in_a_cuda_graph():
    """No launcher synchronises; each replay draws new dropout, because the seed comes from torch's generator."""
    model = gpt(n_unmasked=5, attn_pdrop=0.5).cuda()
    tokens = torch.randint(11, (2, 12), device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            model(tokens, targets=tokens)[1].backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(tokens, targets=tokens)[1]
        loss.backward()
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(loss.item())
    assert len(set(losses)) == 3
    assert all(p.grad.isfinite().all() for p in model.parameters())
