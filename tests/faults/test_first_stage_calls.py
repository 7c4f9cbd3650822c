"""Calls of the first stage's CPU engine that are interrupted, lack memory, or run side by side."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from tamingfast.engines import cpu_first_stage, first_stage
from tamingfast.models.autoencoder import Decoder
from tamingfast.ops import backends

NATIVE, WHY = backends.native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=WHY)
GEOMETRY = dict(
    ch=64, in_channels=3, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=4,
    double_z=False,
)  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return Decoder(**GEOMETRY).eval()


def decode_until_interrupted(timer: threading.Timer, model: nn.Module, x: torch.Tensor, memory: int | None) -> None:
    timer.start()
    for _ in range(10_000):
        first_stage.run(model, x, memory)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize("files", [False, True], ids=["in memory", "in bands"])
def test_an_interrupt_ends_a_decode_and_leaves_nothing(files):
    """Ctrl-C at different moments, in memory and with maps in scratch files; then the model decodes as before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = network()
    x = torch.randn(2, 4, 24, 24)
    expected = first_stage.run(model, x)
    engine = first_stage.engine_for(model)
    shape = tuple(x.shape[1:])
    memory = 2 * (4 * engine.band(shape) + 4 * engine.result(shape)) if files else None
    opened = open_files()
    try:
        for delay in (0.0, 0.01, 0.05):
            timer = threading.Timer(delay, _thread.interrupt_main)
            with pytest.raises(KeyboardInterrupt):
                decode_until_interrupted(timer, model, x, memory)
            timer.join()
            assert torch.equal(first_stage.run(model, x, memory), expected)
    finally:
        signal.signal(signal.SIGINT, before)
    assert open_files() == opened


def test_an_interrupted_packing_is_repeated(monkeypatch):
    model, x = network(), torch.randn(1, 4, 5, 5)
    pack = cpu_first_stage._pack
    packed = []

    def interrupted(*arguments):
        packed.append(1)
        if len(packed) == 4:
            raise KeyboardInterrupt
        return pack(*arguments)

    monkeypatch.setattr(cpu_first_stage, "_pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first_stage.run(model, x)
    torch.testing.assert_close(
        first_stage.run(model, x), first_stage.run(model, x, engine="torch"), rtol=1e-3, atol=1e-4
    )


def test_threads_share_a_model(monkeypatch):
    """Started together on a model that nobody has packed: it is packed once, and all get the same bits."""
    model, made = network(), []
    create = cpu_first_stage.FirstStageEngine.__init__

    def slow(self, network, keep=True):
        if keep:
            made.append(1)
            time.sleep(0.05)  # for the others to arrive
        create(self, network, keep)

    monkeypatch.setattr(cpu_first_stage.FirstStageEngine, "__init__", slow)
    inputs = [torch.randn(1 + number % 2, 4, 7 + number, 9) for number in range(6)]
    start = threading.Barrier(4)

    def work(worker: int) -> list[torch.Tensor]:
        start.wait()
        order = inputs[worker:] + inputs[:worker]
        found = [first_stage.run(model, x) for x in order]
        return found[-worker:] + found[:-worker] if worker else found

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert len(made) == 1
    for number, x in enumerate(inputs):
        alone = first_stage.run(model, x)
        assert all(torch.equal(result[number], alone) for result in results)


def test_threads_with_models_and_engines_of_their_own():
    models = [network() for _ in range(3)]
    models[1].conv_out.bias.data += 1
    x = torch.randn(1, 4, 9, 9)
    expected = [first_stage.run(model, x) for model in models]

    def work(number: int) -> bool:
        with first_stage.using("torch" if number == 2 else "auto"):
            return all(torch.equal(first_stage.run(models[number], x), wanted[number]) for _ in range(8))

    wanted = [*expected[:2], first_stage.run(models[2], x, engine="torch")]
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


#: Decodes under limits of the address space, from far too little to enough, and prints how each attempt ended.
LIMITED = """
import resource, sys, torch
from tamingfast import errors
from tamingfast.engines import first_stage
from tamingfast.models.autoencoder import Decoder

torch.set_num_threads(1)
torch.manual_seed(0)
geometry = dict(ch=128, in_channels=3, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=32,
                z_channels=4, double_z=False)
x = torch.randn(1, 4, 64, 64)
first_stage.run(Decoder(**geometry).eval(), x[..., :2, :2])  # loads what is loaded on demand
model = Decoder(**geometry).eval()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
for mib in (4, 16, 48, 96, 128, 144, 160):
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, hard))
    try:
        first_stage.run(model, x, engine="native", memory=2**40)
        said = "decoded"
    except Exception as error:
        said = errors.in_words(error) or f"{type(error).__name__}: {error}"
        del error
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print(said)
found = first_stage.run(model, x)
torch.testing.assert_close(found, first_stage.run(model, x, engine="torch"), rtol=1e-3, atol=1e-4)
print("right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_too_little_memory_is_one_sentence():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    assert last == "right"
    refused = [line for line in said if line != "decoded"]
    assert len(said) == 7 and len(refused) >= 2
    assert all(line.startswith("memory: got too little (") and ", expected enough" in line for line in refused), said
