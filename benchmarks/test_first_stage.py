"""The CPU engine of encoders and decoders against torch: the f = 16 network of the paper's ImageNet model.

Weights are random. Every measurement has a process of its own, in which the engine and its rivals take turns; the best
of their times counts. Rivals: torch with contiguous and with channels-last maps, torch.compile with freezing
(TAMINGFAST_BENCH_COMPILE=1: it compiles for minutes), and OpenVINO where it is installed. With "kept pages" the C
library keeps freed memory: page faults, of which torch's large maps cause many, then flatter no one. The rate is that
of direct convolutions, most of whose multiplications the engine saves, beside the limit measured in that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tamingfast.ops import backends

NATIVE, WHY = backends.native()
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}
ROUNDS = int(os.environ.get("TAMINGFAST_BENCH_ROUNDS", "5"))

SCRIPT = """
import json, os, resource, sys, time, torch
from measuring import limits
from tamingfast.engines import first_stage, layers
from tamingfast.models.autoencoder import Decoder, Encoder

kind, side, batch, rounds = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_grad_enabled(False)
torch.manual_seed(0)
common = dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256,
              z_channels=256, in_channels=3, out_ch=3, double_z=False)
make = {"decode": lambda: Decoder(**common), "encode": lambda: Encoder(**common)}
model = make[kind]().eval()
x = torch.randn(batch, 256, side // 16, side // 16) if kind == "decode" else torch.randn(batch, 3, side, side)
sides = layers.shapes(model.layers(), tuple(x.shape[1:]))
flop = 2 * batch * sum(layers.work(layer, after) for layer, after in zip(model.layers(), sides[1:]))

begun = time.perf_counter()
engine = first_stage.engine_for(model)
packing = time.perf_counter() - begun
runs = {"engine": lambda: first_stage.run(model, x, engine="native")}
runs["torch"] = lambda: model(x)
twin = make[kind]().eval()
twin.load_state_dict(model.state_dict())
twin = twin.to(memory_format=torch.channels_last)
y = x.contiguous(memory_format=torch.channels_last)
runs["torch, channels last"] = lambda: twin(y)
if os.environ.get("TAMINGFAST_BENCH_COMPILE") == "1":
    import torch._inductor.config
    torch._inductor.config.freezing = True
    fast = torch.compile(twin)
    runs["torch.compile"] = lambda: fast(y)
try:
    import openvino
    core = openvino.Core()
    compiled = core.compile_model(openvino.convert_model(model, example_input=x), "CPU",
                                  {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"})
    runs["OpenVINO"] = lambda: torch.from_numpy(compiled(x.numpy())[0])
except ImportError:
    pass
expected = model(x)
for name, run in runs.items():
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3, msg=lambda text: f"{name}: {text}")
best = dict.fromkeys(runs, float("inf"))
for _ in range(rounds):
    for name, run in runs.items():
        begun = time.perf_counter()
        run()
        best[name] = min(best[name], time.perf_counter() - begun)
print(json.dumps({
    "seconds": best, "flop": flop, "packing_seconds": packing, "packed_bytes": engine.info()["weight_bytes"],
    "weight_bytes": 4 * sum(p.numel() for p in model.parameters()),
    "maps_bytes": engine.peak(tuple(x.shape[1:])) * batch,
    "limit_gflop_per_s": limits("cpu")["float32_gflop_per_s"],
}))
"""


@pytest.mark.quick(kind="decode", side=256, batch=1, pages="kept pages")
@pytest.mark.parametrize("pages", ["default pages", "kept pages"])
@pytest.mark.parametrize(
    ("kind", "side", "batch"), [("decode", 256, 1), ("decode", 256, 8), ("encode", 256, 1), ("decode", 1024, 1)]
)
@pytest.mark.skipif(NATIVE is None, reason=WHY)
def test_first_stage(benchmark, pytestconfig, kind, side, batch, pages):
    environment = os.environ | (KEPT if pages == "kept pages" else {})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    rounds = 1 if pytestconfig.getoption("--quick") else ROUNDS if side == 256 and batch == 1 else 2
    words = [sys.executable, "-c", SCRIPT, kind, str(side), str(batch), str(rounds)]

    def measure() -> dict:
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    found = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= found
    ours = found["seconds"].pop("engine")
    rate = found["flop"] / ours / 1e9
    print(
        f"\n  engine {ours:.2f} s, {rate:.0f} GFLOP/s of direct convolutions, "
        f"{rate / found['limit_gflop_per_s']:.0%} of the limit; weights packed in {found['packing_seconds']:.2f} s, "
        f"{found['packed_bytes'] / found['weight_bytes']:.1f} times their size"
    )
    for name, spent in found["seconds"].items():
        print(f"  {name}: {spent:.2f} s, {spent / ours:.2f} times the engine's")
