"""The paper's comparison on CIFAR10: sampling 1024 pixels of 512 colours against 256 latents of 1024 codes.

The geometry is the paper's (GPT2-medium; a VQGAN with f = 2), the weights are random, and `lookahead=1` everywhere, so
nothing depends on how well tokens can be guessed. Protocols as in `tamingfast.reproduce.pixels`: (a) the paper's, a
full forward pass per token, integrated over prefix lengths and checked against one whole run of the latents; (b) with a
key/value cache in torch; (c) our fastest path. Minutes on a CPU. TAMINGFAST_BENCH_TINY=1 runs it in seconds.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from sampling_cost import CostModel, Sequences, overhead_of_the_paper

from tamingfast.engines import layers
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.reproduce.budget import forward_flops
from tamingfast.reproduce.pixels import measure_speed
from tamingfast.reproduce.pixels_report import PAPER_RATIO
from tamingfast.reproduce.timing import STEPS_PER_NODE

TINY = os.environ.get("TAMINGFAST_BENCH_TINY") == "1"
WHOLE = dict(n_layer=24, n_head=16, n_embd=1024)
SMALL = dict(n_layer=2, n_head=2, n_embd=32)
CODES, COLORS = 1024, 512
SAMPLING = {"temperature": 1.0, "top_k": 100, "seed": 0, "lookahead": 1}
TIMING: dict[str, Any] = {
    "batch": 1, "prefixes": 5, "repeats": 1, "fastest_batches": [1, 8], "fastest_dtypes": [None, "bfloat16", "int8"]
}  # fmt: skip


def model(first_stage: str, params: dict[str, Any], gpt: dict[str, int]) -> Net2NetTransformer:
    torch.manual_seed(0)
    return Net2NetTransformer(
        {"target": "tamingfast.models.gpt.GPT", "params": gpt},
        {"target": first_stage, "params": params},
        "__is_unconditional__",
    ).eval()  # fmt: skip


def models(side: int, geometry: dict[str, int], **smaller: Any) -> dict[str, Net2NetTransformer]:
    ddconfig = dict(
        double_z=False, z_channels=256, resolution=side, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2],
        num_res_blocks=2, attn_resolutions=[side // 2], dropout=0.0,
    ) | smaller  # fmt: skip
    stage = dict(ddconfig=ddconfig, lossconfig={"target": "torch.nn.Identity"}, n_embed=CODES, embed_dim=256)
    latents = dict(vocab_size=CODES, block_size=(side // 2) ** 2) | geometry
    pixels = dict(vocab_size=COLORS, block_size=side**2) | geometry
    return {
        "latents": model("tamingfast.models.vqgan.VQModel", stage, latents),
        "pixels": model("tamingfast.models.color_clusters.ColorClusters", {"ncluster": COLORS}, pixels),
    }


def decoder_flop(prior: Net2NetTransformer, side: int) -> float:
    decoder = getattr(prior.first_stage_model, "decoder", None)
    if decoder is None:
        return 0.0
    sides = layers.shapes(decoder.layers(), (256, side // 2, side // 2))
    return 2.0 * sum(layers.work(layer, after) for layer, after in zip(decoder.layers(), sides[1:], strict=True))


def explained(
    speed: dict[str, Any], priors: dict[str, Net2NetTransformer], side: int, geometry: dict[str, int]
) -> dict[str, Any]:
    """The cost model that the steps of protocol (a) give, and what it says of the ratio."""
    sequences, operations, seconds = {}, [], []
    for name, prior in priors.items():
        found, vocabulary = speed["paper"][name], prior.transformer.config.vocab_size
        sequences[name] = Sequences(found["tokens"], vocabulary, found["decode_seconds"], decoder_flop(prior, side))
        operations += [forward_flops(geometry, node + STEPS_PER_NODE // 2, vocabulary) for node in found["prefixes"]]
        seconds += found["step_seconds"]
    cost = CostModel.fitted(operations, seconds)
    parts = {name: cost.parts(geometry, one) for name, one in sequences.items()}
    flop = {name: sum(one.flop(geometry)) + one.decode_flop for name, one in sequences.items()}
    return {
        "overhead_milliseconds": cost.overhead * 1e3,
        "linear_gflop_per_s": 1e-9 / cost.linear if cost.linear else None,
        "attention_gflop_per_s": 1e-9 / cost.attention if cost.attention else None,
        "seconds": parts,
        "ratio": sum(parts["pixels"].values()) / sum(parts["latents"].values()),
        "ratio_of_operations": flop["pixels"] / flop["latents"],
        "overhead_gflop_that_gives_the_papers_ratio": overhead_of_the_paper(geometry, **sequences) / 1e9,
    }


@pytest.mark.quick
def test_pixels_vs_latents(benchmark, quick):
    small = TINY or quick
    side, geometry = (8, SMALL) if small else (32, WHOLE)
    priors = models(side, geometry, **(dict(ch=32, num_res_blocks=1) if small else {}))
    speed = benchmark.pedantic(lambda: measure_speed(priors, side, SAMPLING, **TIMING), rounds=1)
    found = explained(speed, priors, side, geometry)
    ratios = {
        protocol: rows["pixels"]["seconds_per_image"] / rows["latents"]["seconds_per_image"]
        for protocol, rows in speed.items()
        if isinstance(rows, dict)
    }
    benchmark.extra_info |= {"speed": speed, "ratios": ratios, "paper_ratio": PAPER_RATIO, "cost_model": found}
    check = speed["paper"]["latents"]
    print(
        f"\n  whole run of latents {check['whole_run_seconds_per_image']:.1f} s, integrated "
        f"{check['seconds_per_image']:.1f} s"
    )
    slowest = speed["paper"]["pixels"]["seconds_per_image"]
    for protocol, ratio in ratios.items():
        seconds = {name: row["seconds_per_image"] for name, row in speed[protocol].items()}
        print(
            f"  {protocol}: pixels {seconds['pixels']:.2f} s, latents {seconds['latents']:.2f} s an image, ratio "
            f"{ratio:.2f} (paper: {PAPER_RATIO}); pixels by the paper's protocol take "
            f"{slowest / seconds['latents']:.0f} times as long as these latents"
        )
    for name, value in found.items():
        print(f"  {name}: {value}")
