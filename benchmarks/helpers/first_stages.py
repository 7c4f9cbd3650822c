"""Measures the CPU engine of encoders and decoders beside its rivals; as a program, prints the table of all work.

    python benchmarks/helpers/first_stages.py           # minutes
    python benchmarks/helpers/first_stages.py --quick   # a look at the first row

Weights are random, geometries those of the presets. Every row has a process of its own, in which the engine and its
rivals take turns; results are compared when a way runs for the first time, and the best of its times counts. Rivals:
torch with contiguous and with channels-last maps, torch.compile with freezing (only with kept pages, as it compiles for
a minute or more; `TAMINGFAST_BENCH_COMPILE=0` leaves it out), and OpenVINO and ONNX Runtime where they are installed.
"Kept pages": the C library keeps freed memory, so that the page faults of torch's large maps flatter no one. The rate
is that of direct convolutions, most of whose multiplications the engine saves, beside the rate of the matrix product.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = ("default pages", "kept pages")
_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}
SMALL_MEMORY = 192 << 20
OURS = "engine"


@dataclass(frozen=True)
class Work:
    """One row: what is run, on images of ``side`` pixels, ``batch`` at a time, how often, and the ratio to reach."""

    name: str
    side: int
    batch: int
    rounds: int
    goal: float

    @property
    def title(self) -> str:
        if self.name == "train":
            return f"a step of a small prior on {self.batch} raw images of {self.side}x{self.side}"
        return f"{self.name} {self.side}x{self.side}, batch {self.batch}"


WORKS = (
    Work("decode", 256, 1, 5, 2.0),
    Work("decode", 256, 8, 2, 2.0),
    Work("decode", 1024, 1, 1, 2.5),
    Work("encode", 256, 1, 4, 2.0),
    Work("train", 32, 16, 4, 1.4),
    Work("train", 256, 4, 3, 1.4),
)


def measure(work: Work, pages: str, rounds: int | None = None, compiled: bool = False) -> dict[str, Any]:
    """Seconds of each way by its name, and facts about them, from a process of its own."""
    environment = os.environ | (_KEPT if pages == "kept pages" else {})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    words = [str(WORKS.index(work)), str(rounds or work.rounds), str(int(compiled))]
    done = subprocess.run([sys.executable, __file__, "--one", *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe(found: dict[str, Any]) -> str:
    """The measurements as lines."""
    ours = found["seconds"][OURS]
    lines = []
    for name, spent in found["seconds"].items():
        peak = found["peak_mib"].get(name)
        memory = "" if peak is None else f", {peak:.0f} MiB more than before at most"
        lines.append(f"  {name}: {spent:.3f} s, {spent / ours:.2f} times the engine's{memory}")
    if "flop" in found:
        lines.append(
            f"  {found['flop'] / ours / 1e9:.0f} GFLOP/s of direct convolutions beside {found['product_gflop']:.0f} of "
            f"the matrix product; packed in {found['packing_seconds']:.2f} s, weights "
            f"{found['packed_bytes'] / found['weight_bytes']:.1f} times the checkpoint's, maps "
            f"{found['maps_bytes'] / 2**20:.0f} MiB"
        )
    return "\n".join(lines)


# --- the table --------------------------------------------------------------------------------------------------------


def table(rows: dict[tuple[Work, str], dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| work | pages | engine, s | best of torch, s | ratio | goal | OpenVINO | ONNX Runtime | GFLOP/s, matrix "
        "product's | peak memory, engine / torch, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (work, pages), found in rows.items():
        seconds, peak = found["seconds"], found["peak_mib"]
        ours, name = seconds[OURS], min((key for key in seconds if key.startswith("torch")), key=seconds.__getitem__)
        others = [f"{seconds[key] / ours:.2f}x" if key in seconds else "-" for key in ("OpenVINO", "ONNX Runtime")]
        rate = f"{found['flop'] / ours / 1e9:.0f}, {found['product_gflop']:.0f}" if "flop" in found else "-"
        memory = " / ".join(f"{peak[key]:.0f}" if key in peak else "-" for key in (OURS, "torch"))
        best = f"{seconds[name]:.3f} ({name})"
        ratio = f"**{seconds[name] / ours:.2f}x**"
        cells = [work.title, pages, f"{ours:.3f}", best, ratio, f"{work.goal}x", *others, rate, memory]
        lines.append(f"| {' | '.join(cells)} |")
        for key in (key for key in seconds if key.startswith(f"{OURS}, ")):
            cells = [f"{work.title}, {key.removeprefix(f'{OURS}, ')}", pages, f"{seconds[key]:.3f}", best]
            cells += [f"{seconds[name] / seconds[key]:.2f}x", f"{seconds[key] / ours:.2f} of whole", "-", "-", "-"]
            lines.append(f"| {' | '.join([*cells, f'{peak[key]:.0f} / -' if key in peak else '-'])} |")
    return "\n".join(lines)


def main(quick: bool) -> None:
    rows = {}
    compiled = os.environ.get("TAMINGFAST_BENCH_COMPILE", "1") == "1" and not quick
    for work in WORKS[:1] if quick else WORKS:
        both = work == WORKS[0] and not quick
        for pages in PAGES if both else PAGES[:1]:
            found = measure(work, pages, 1 if quick else None, compiled and pages == "kept pages")
            rows[work, pages] = found
            print(f"{work.title}, {pages}\n{describe(found)}\n", flush=True)
    print(table(rows))


# --- one row, in its own process --------------------------------------------------------------------------------------


def _one(work: Work, rounds: int, compiled: bool) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    if work.name == "train":
        ways, facts = _training(work)
    else:
        ways, facts = _network(work, compiled)
    best: dict[str, float] = {}
    peaks: dict[str, float] = {}
    expected = None
    for number in range(rounds):
        for name, way in ways.items():
            with _peak(peaks, name):
                begun = time.perf_counter()
                result = way()
                spent = time.perf_counter() - begun
            best[name] = min(best.get(name, spent), spent)
            if number == 0:
                expected = result if expected is None else expected
                _check(name, result, expected)
            del result
    if "MALLOC_MMAP_MAX_" in os.environ:
        peaks = {}  # what is kept is no one's
    return {"seconds": best, "peak_mib": peaks} | facts


def _check(name: str, found: Any, expected: Any) -> None:
    import torch

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=lambda text: f"{name}: {text}")


def _network(work: Work, compiled: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    import torch

    from tamingfast.engines import first_stage, layers
    from tamingfast.models.autoencoder import Decoder, Encoder

    torch.set_grad_enabled(False)
    make = Decoder if work.name == "decode" else Encoder
    geometry: dict[str, Any] = dict(
        ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256, z_channels=256,
        in_channels=3, out_ch=3, double_z=False,
    )  # fmt: skip
    model = make(**geometry).eval()
    cells, side = work.side // 16, work.side
    x = torch.randn(work.batch, 256, cells, cells) if make is Decoder else torch.randn(work.batch, 3, side, side)
    begun = time.perf_counter()
    engine = first_stage.engine_for(model)
    packing = time.perf_counter() - begun
    channels_last = make(**geometry).eval()
    channels_last.load_state_dict(model.state_dict())
    channels_last.to(memory_format=torch.channels_last)
    y = x.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: first_stage.run(model, x, 2**40, engine="native"),
        "torch": lambda: model(x),
        "torch, channels last": lambda: channels_last(y),
    }
    if work.side > 256:
        ways[f"{OURS}, in 192 MiB"] = lambda: first_stage.run(model, x, SMALL_MEMORY, engine="native")
    else:
        if compiled:
            ways["torch.compile, freezing"] = _compiled(channels_last, y)
        ways |= _peers(model, x)
    sides = layers.shapes(model.layers(), tuple(x.shape[1:]))
    products = zip(model.layers(), sides[1:], strict=True)
    return ways, {
        "flop": 2 * work.batch * sum(layers.work(layer, after) for layer, after in products),
        "packing_seconds": packing,
        "packed_bytes": engine.info()["weight_bytes"],
        "weight_bytes": 4 * sum(parameter.numel() for parameter in model.parameters()),
        "maps_bytes": engine.peak(tuple(x.shape[1:])) * work.batch,
        "product_gflop": _product_rate(),
    }


def _compiled(model: Any, x: Any) -> Callable[[], Any]:
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True
    fast = torch.compile(model)
    fast(x)
    return lambda: fast(x)


def _peers(model: Any, x: Any) -> dict[str, Callable[[], Any]]:
    """Inference engines that are installed, with as many threads as torch."""
    import torch

    found: dict[str, Callable[[], Any]] = {}
    threads = torch.get_num_threads()
    with contextlib.suppress(ImportError):
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        converted = openvino.convert_model(model, example_input=x)
        ready = openvino.Core().compile_model(converted, "CPU", settings)
        found["OpenVINO"] = lambda: torch.from_numpy(ready(x.numpy())[0].copy())
    with contextlib.suppress(ImportError):
        import io

        import onnx  # noqa: F401  torch needs it to export
        import onnxruntime

        file = io.BytesIO()
        torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=False, opset_version=17)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        found["ONNX Runtime"] = lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    return found


def _training(work: Work) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """A step of a transformer of 6 layers and width 256 on 256 tokens; returns the loss.

    The first stage is that of the preset for CIFAR10 (f = 2), or for folders of larger images (f = 16).
    """
    import torch
    import torch.nn.functional as F
    from omegaconf import OmegaConf

    from tamingfast.engines import first_stage
    from tamingfast.models.prior import Net2NetTransformer

    name = "cifar10_vqgan" if work.side == 32 else "folder_vqgan"
    preset = OmegaConf.to_container(OmegaConf.load(ROOT / "tamingfast" / "configs" / f"{name}.yaml"))
    stage = preset["model"] | {}
    stage["params"] = stage["params"] | {"lossconfig": {"target": "torch.nn.Identity"}}
    side = work.side // 2 ** (len(stage["params"]["ddconfig"]["ch_mult"]) - 1)
    gpt = dict(vocab_size=1024, block_size=side * side, n_layer=6, n_head=8, n_embd=256)
    model = Net2NetTransformer(
        {"target": "tamingfast.models.gpt.GPT", "params": gpt}, stage, "__is_unconditional__"
    )  # fmt: skip
    x = torch.rand(work.batch, 3, work.side, work.side) * 2 - 1
    state = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=1e-4)

    def step(engine: str, last: bool) -> torch.Tensor:
        model.transformer.load_state_dict(state)
        layout = torch.channels_last if last else torch.contiguous_format
        with first_stage.using(engine):
            z = model.encode_to_z(x.contiguous(memory_format=layout))[1]
        c = torch.zeros(work.batch, 1, dtype=torch.int64)
        logits = model.token_logits(z, c)
        loss = F.cross_entropy(logits.flatten(0, 1), z.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return {
        OURS: lambda: step("native", False),
        "torch": lambda: step("torch", False),
        "torch, channels last": lambda: step("torch", True),
    }, {}


def _product_rate() -> float:
    """GFLOP/s of torch's matrix product, the best of a few."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    spent = []
    for _ in range(8):
        begun = time.perf_counter()
        a @ b
        spent.append(time.perf_counter() - begun)
    return 2 * 1024**3 / min(spent) / 1e9


@contextlib.contextmanager
def _peak(peaks: dict[str, float], name: str) -> Iterator[None]:
    """Adds how far the process's resident memory rose inside the block, in MiB, where the system tells."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
    except (OSError, KeyError):
        yield
        return
    yield
    peaks[name] = max(peaks.get(name, 0.0), (_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """A size in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int({line.partition(":")[0]: line for line in lines}[name].split()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the first row, one round, without torch.compile")
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        number, rounds, compiled = arguments.one
        print(json.dumps(_one(WORKS[number], rounds, bool(compiled))))
    else:
        main(arguments.quick)
