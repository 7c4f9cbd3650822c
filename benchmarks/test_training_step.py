"""A training step of each stage: on a GPU with the Triton kernels and with torch's operators, both under autocast; on
a CPU in float32 and under bfloat16 autocast, which is slower where the processor has no instructions for it."""

from __future__ import annotations

from unittest import mock

import gpu
import pytest
import torch
import training_steps
from measuring import seconds

from tamingfast.models.gpt import GPT
from tamingfast.models.vqgan import VQModel
from tamingfast.ops import backends


def prior(n_unmasked: int) -> tuple:
    """GPT2-medium on 256 image tokens after 256 condition tokens."""
    model = GPT(1024, 512, n_layer=24, n_head=16, n_embd=1024, n_unmasked=n_unmasked)
    return model, lambda: torch.randint(1024, (12, 512), device="cuda"), lambda model, x: model(x, targets=x)[1]


def first_stage(ch: int = 128) -> tuple:
    """The paper's f=16 VQGAN without its adversarial and perceptual losses, for which there are no kernels."""
    ddconfig = {
        "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": ch,
        "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
    }  # fmt: skip
    model = VQModel(ddconfig, {"target": "torch.nn.Identity"}, n_embed=1024, embed_dim=256)

    def loss(model: VQModel, x: torch.Tensor) -> torch.Tensor:
        quant, codebook_loss, _ = model.encode(x)
        return (model.decode(quant) - x).abs().mean() + codebook_loss

    return model, lambda: torch.rand(4, 3, 256, 256, device="cuda") * 2 - 1, loss


CASES = {"prior": lambda: prior(0), "prior with a prefix": lambda: prior(256), "VQGAN": first_stage}


@pytest.mark.quick
def test_training_step_on_a_cpu(benchmark, quick):
    """The first stage's step at a sixteenth of the pixels, a quarter of the width and batch 4."""
    model, _, loss = first_stage(ch=32)
    x = torch.rand(4, 3, 64, 64) * 2 - 1

    def step(bfloat16: bool) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(model, x)
        value.backward()

    step(True)
    benchmark.pedantic(lambda: step(False), warmup_rounds=1, rounds=2 if quick else 10)
    mine, theirs = benchmark.stats.stats.median, min(seconds(lambda: step(True), "cpu") for _ in range(2))
    benchmark.extra_info |= {"bfloat16_seconds": theirs}
    print(f"\n  {len(x) / mine:.1f} images/s in float32, {len(x) / theirs:.1f} images/s in bfloat16")


@pytest.mark.quick
@pytest.mark.parametrize("stage", ["first stage", "prior"])
def test_parts_of_a_step_beside_the_originals(stage, quick):
    """On a CPU in the geometries of its presets; the losses of all ways are compared first."""
    ways = (training_steps.first_stages if stage == "first stage" else training_steps.priors)(
        False, torch.device("cpu")
    )
    if quick:
        ways = {name: way for name, way in ways.items() if "compiled" not in name}
    print("\n" + "\n".join(training_steps.table(stage, training_steps.measure(ways, 1 if quick else 7))))


@pytest.mark.gpu
@pytest.mark.quick(case="prior", channels_last=False)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("case", CASES)
def test_training_step(case, channels_last):
    if channels_last and case != "VQGAN":
        pytest.skip("only images have channels")
    torch.manual_seed(0)
    model, draw, loss = CASES[case]()
    model = model.cuda()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    inputs = [draw() for _ in range(4)]

    def step(x: torch.Tensor) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(model, x)
        value.backward()
        return value.detach()

    def torchs(x: torch.Tensor) -> torch.Tensor:
        absent = backends.Availability(False, "left out, to time torch")
        with backends.use(None), mock.patch.dict(backends.PROBES, triton=lambda: absent):
            return step(x)

    torch.testing.assert_close(step(inputs[0]), torchs(inputs[0]), rtol=2e-2, atol=0)
    times = {"ours": gpu.milliseconds(step, inputs), "torch": gpu.milliseconds(torchs, inputs)}
    gpu.record("training step", case + (", channels last" if channels_last else ""), times, ["torch"])
