"""Where the time of a training step goes, and how it compares with the original's; as a program, prints the table.

    python benchmarks/helpers/training_steps.py             # geometries of the CPU presets, minutes
    python benchmarks/helpers/training_steps.py --device cuda --large
    python benchmarks/helpers/training_steps.py --quick     # a look

Stages run on photographs with a discriminator that learns, without LPIPS, whose weights need not be there. Each way of
a step has a model of its own, with the same first weights; the ways take turns, and medians count. "As the original":
the definition of each operation in plain torch (attention by a mask, the matrix of distances to all codes, norm and
swish apart), optimizers that visit one parameter after the other, and every health value read at once. "Shared" is
`training.shared_forward`, which saves the discriminator's own pass and departs from the original.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tamingfast import ops
from tamingfast.data import build
from tamingfast.models.prior import Net2NetTransformer
from tamingfast.models.vqgan import VQModel
from tamingfast.ops import backends
from tamingfast.ranks import World
from tamingfast.training import load_config
from tamingfast.training.acceleration import accelerate, fuse
from tamingfast.training.feed import step_batches
from tamingfast.training.health import Monitor
from tamingfast.training.prior_stage import PriorStage
from tamingfast.training.settings import Training
from tamingfast.training.step import step
from tamingfast.training.vqgan import VQGANStage

PARTS = ("data", "forward", "backward", "optimizer", "rest")
WAYS = ("as the original", "ours", "ours, shared", "ours, compiled")
_RATE = 1e-4


def nearest_by_matrix(z: Tensor, codebook: Tensor) -> Tensor:
    """The original's formula, in float32: all distances |z|^2 + |c|^2 - 2 z.c, then the least of each row."""
    norms = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return (norms - 2 * z @ codebook.T).argmin(1)


class Clock:
    """Seconds of each part of a step; what is begun inside another part is not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, name: str, run: Any) -> Any:
        def within(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return run(*arguments, **options)

        return within


class Way:
    """One way of training one stage, which takes steps one at a time."""

    def __init__(self, name: str, stage: Any, settings: Training, dataset: Any, device: torch.device) -> None:
        self.name, self.stage, self.settings, self.number = name, stage, settings, 0
        self.values: dict[str, Tensor] = {}  # of the last step
        self.device, self.original = device, name == WAYS[0]
        every = 1 if self.original or device.type == "cpu" else settings.log_every
        self.monitor = Monitor(_RATE, settings.precision, every)
        self.batches = step_batches(dataset, settings, World(0, 1, device), 0)
        if self.original:
            for optimizer in stage.optimizers:
                for group in optimizer.param_groups:
                    group.update(foreach=False)
        else:
            accelerate(stage.model, settings)
            fuse(stage.optimizers)

    def step(self, divided: bool) -> dict[str, float]:
        """Take a step; its whole time, or that of its parts, which waits for the device after each."""
        clock, loss = Clock(self.device), self.stage.loss
        self.stage.model.global_step = self.number
        torch.manual_seed(self.number)
        backward = Tensor.backward
        with contextlib.ExitStack() as stack:
            stack.enter_context(backends.use("reference" if self.original else None))
            if self.original:
                stack.enter_context(mock.patch.object(ops, "nearest_code", nearest_by_matrix))
            if divided:
                loss = clock.timed("forward", loss)
                stack.enter_context(mock.patch.object(Tensor, "backward", clock.timed("backward", backward)))
                for optimizer in self.stage.optimizers:
                    stack.enter_context(mock.patch.object(optimizer, "step", clock.timed("optimizer", optimizer.step)))
            clock._wait()
            began = time.perf_counter()
            with clock.part("data") if divided else contextlib.nullcontext():
                batches = next(self.batches)[1]
            self.values = step(
                self.stage.optimizers, loss, batches, device=self.device.type, precision=self.settings.precision,
                check=lambda loss, norm, values: self.monitor.check(self.number, loss, norm, values, batches),
            )  # fmt: skip
            clock._wait()
            whole = time.perf_counter() - began
        self.number += 1
        if not divided:
            return {"whole": whole}
        return clock.seconds | {"rest": whole - sum(clock.seconds.values()), "whole": whole}


def first_stages(large: bool, device: torch.device) -> dict[str, Way]:
    """The ways of the first stage: of photos32_vqgan, or if it is to be ``large`` of photos256_vqgan."""
    config = load_config("photos256_vqgan" if large else "photos32_vqgan")
    params = config["model"]["params"]
    params["lossconfig"]["params"] |= {"disc_start": 0, "perceptual_weight": 0.0}
    dataset, found = build(config["data"])[0], {}
    for name in WAYS:
        settings = Training(batch_size=12 if large else 16, compile=name == "ours, compiled", workers=0)
        torch.manual_seed(0)
        stage = VQGANStage(VQModel(**params).train().to(device), _RATE, shared_forward=name == "ours, shared")
        found[name] = Way(name, stage, settings, dataset, device)
    return found


def priors(large: bool, device: torch.device) -> dict[str, Way]:
    """The ways of a prior on such a first stage: of ``tiny``, or if it is to be ``large`` of gpt2_small."""
    first = load_config("photos256_vqgan" if large else "photos32_vqgan")
    config = load_config("gpt2_small" if large else "tiny")
    gpt = config["model"]["params"]["transformer_config"]["params"] | {"vocab_size": 1024, "block_size": 256}
    dataset, found = build(first["data"])[0], {}
    for name in WAYS:
        if name == "ours, shared":
            continue  # a prior has one optimizer
        settings = Training(batch_size=12, compile=name == "ours, compiled", workers=0)
        torch.manual_seed(0)
        model = Net2NetTransformer(
            {"target": "tamingfast.models.gpt.GPT", "params": gpt},
            {"target": "tamingfast.models.vqgan.VQModel", "params": first["model"]["params"]},
            "__is_unconditional__",
        ).train()
        found[name] = Way(name, PriorStage(model.to(device), _RATE, (16, 16)), settings, dataset, device)
    return found


def check(way: Way, original: Way) -> None:
    """Raise AssertionError unless the first step of ``way`` has the losses of the original's."""
    for name in way.values.keys() & {"loss", "rec_loss", "quant_loss", "nll_loss"}:
        torch.testing.assert_close(way.values[name], original.values[name], rtol=2e-2, atol=1e-4)


def measure(ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """The median seconds of whole steps of each way, and of the parts of steps in another series."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for way in ways.values():  # what is made on first use, such as compiled code
        way.step(False)
        check(way, ways[WAYS[0]])
    for way in ways.values():
        way.step(False)
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way.step(False))
        for name, way in ways.items():
            parts[name].append(way.step(True))
    return {
        name: {part: statistics.median(each[part] for each in parts[name]) for part in PARTS}
        | {"whole": statistics.median(each["whole"] for each in times[name])}
        for name in ways
    }


def table(stage: str, found: dict[str, dict[str, float]]) -> list[str]:
    """The rows of a Markdown table."""
    base = found[WAYS[0]]["whole"]
    return [
        f"| {stage} | {name} | " + " | ".join(f"{1e3 * row[part]:.0f}" for part in (*PARTS, "whole"))
        + f" | {base / row['whole']:.2f}x |" for name, row in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="256 pixels and GPT2-small, for a GPU")
    parser.add_argument("--quick", action="store_true", help="by default one round, without compiling")
    parser.add_argument("--rounds", type=int, help="default: 7")
    given = parser.parse_args()
    device = torch.device(given.device)
    print("| stage | way of a step | " + " | ".join(f"{part}, ms" for part in (*PARTS, "whole")) + " | times |")
    print("|---" * (len(PARTS) + 4) + "|")
    for stage, make in (("first stage", first_stages), ("prior", priors)):
        ways = make(given.large, device)
        if given.quick:
            ways.pop(WAYS[-1])
        rounds = given.rounds or (1 if given.quick else 7)
        print("\n".join(table(stage, measure(ways, rounds))), flush=True)


if __name__ == "__main__":
    main()
