"""Decoding of large images in bands: seconds, peak memory and deviation from the whole image.

A decoder with the f = 16 geometry of the paper's ImageNet model, a quarter of its width and random weights. Each of the
two runs has a process of its own and reports by how much its peak resident memory grew. The deviation is measured if
the image also fits whole, in units of 1/255 of the range of the whole image's values. TAMINGFAST_BENCH_PIXELS sets the
side (default 1024, or 512 with --quick), TAMINGFAST_BENCH_CH the width (default 32; the paper's is 128).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CH = int(os.environ.get("TAMINGFAST_BENCH_CH", "32"))
#: Bytes per pixel at the paper's width, in bands and whole: 3 GiB and 48 GiB for 4096 x 4096 pixels.
BYTES, WHOLE_BYTES = 192, 3072

SCRIPT = """
import json, resource, sys, time, torch
from tamingfast.engines import bands
from tamingfast.models.autoencoder import Decoder

side, ch, memory, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
model = Decoder(ch=ch, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256,
                z_channels=64).eval()
smooth = torch.nn.functional.interpolate(torch.randn(1, 64, 6, 6), (side // 16, side // 16), mode="bilinear")
z = smooth + 0.5 * torch.randn(1, 64, side // 16, side // 16)
bands.run(model, z[..., :16, :16], 32 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
image = bands.run(model, z, memory)
spent = time.perf_counter() - begun
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
torch.save(image, out)
print(json.dumps({"seconds": spent, "peak_bytes": peak}))
"""


def decode(side: int, memory: int, out) -> dict:
    words = [sys.executable, "-c", SCRIPT, str(side), str(CH), str(memory), str(out)]
    # glibc keeps freed blocks below 32 MiB, such as the feature maps of small images.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout)


@pytest.mark.quick
def test_band_decode(benchmark, tmp_path, quick):
    import torch

    from tamingfast.ops.backends import available_memory

    side = int(os.environ.get("TAMINGFAST_BENCH_PIXELS", "512" if quick else "1024"))
    memory = BYTES * side**2 * CH // 128
    found = benchmark.pedantic(lambda: decode(side, memory, tmp_path / "bands.pt"), rounds=1)
    benchmark.extra_info |= {"pixels": side, "budget_bytes": memory} | found
    text = f"{side}x{side}: {found['seconds']:.0f} s, {found['peak_bytes'] >> 20} MiB of {memory >> 20} allowed"
    if available_memory(torch.device("cpu")) > WHOLE_BYTES * side**2 * CH // 128:
        whole = decode(side, 1 << 50, tmp_path / "whole.pt")
        image, expected = (torch.load(tmp_path / f"{name}.pt") for name in ("bands", "whole"))
        steps = (image - expected).abs() * 255 / (expected.max() - expected.min())
        benchmark.extra_info |= {
            "whole_seconds": whole["seconds"],
            "whole_peak_bytes": whole["peak_bytes"],
            "deviation_mean_8bit": float(steps.mean()),
            "deviation_max_8bit": float(steps.max()),
        }
        text += (
            f"; whole {whole['seconds']:.0f} s, {whole['peak_bytes'] >> 20} MiB; deviation {float(steps.mean()):.5f} "
            f"of 255 on average, {float(steps.max()):.4f} at most"
        )
    print(f"\n  {text}")
