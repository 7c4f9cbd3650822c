"""What the processes of a training step send, as torch's profiler sees it."""

from __future__ import annotations

import contextlib
import math

import tiny
import torch
from torch.profiler import ProfilerActivity, profile

from tamingfast.models.prior import Net2NetTransformer
from tamingfast.ranks import World
from tamingfast.training.parallel import Averaged, parallel_prior
from tamingfast.training.prior_stage import PriorStage
from tamingfast.training.scaling import Messages
from tamingfast.training.settings import Training
from tamingfast.training.step import step

#: Messages smaller than this are left out: votes, norms, and how DistributedDataParallel orders its messages.
SMALL = 256


def prior() -> Net2NetTransformer:
    """A prior of two layers, all of whose sizes are even, on the tokens of a first stage."""
    torch.manual_seed(0)
    target = "taming.models.cond_transformer.Net2NetTransformer"
    gpt = {"vocab_size": 16, "block_size": 18, "n_layer": 2, "n_head": 2, "n_embd": 16}
    made = {
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        "first_stage_config": {name: tiny.VQGAN["model"][name] for name in ("target", "params")},
        "cond_stage_config": "__is_unconditional__",
    }
    return tiny.build({"model": {"target": target, "params": made}})  # type: ignore[return-value]


def of_ddp(rank: int) -> Messages:
    """The messages of a step of `prior` under DistributedDataParallel."""
    return _of_prior(rank, Training(accumulate=1))


def of_fsdp(rank: int) -> Messages:
    """The messages of a step of two batches of `prior` in parts."""
    return _of_prior(rank, Training(parallel="fsdp", accumulate=2))


def of_first_stage(rank: int) -> Messages:
    """The messages of a step of two batches of a first stage with a discriminator."""
    stage, among = tiny.vqgan_stage(), World(rank, 2, torch.device("cpu"))
    averaging = Averaged(among).averaging
    batches = [tiny.images(2)] * 2
    return _seen(lambda: step(stage.optimizers, stage.loss, batches, averaging=averaging))


def _of_prior(rank: int, settings: Training) -> Messages:
    among = World(rank, 2, torch.device("cpu"))
    stage = PriorStage(prior().train(), 1e-3, (4, 4))
    held = parallel_prior(stage, settings, among, None)
    batch = {"indices": torch.arange(32).view(2, 16) % 16}

    def run() -> None:
        step(stage.optimizers, stage.loss, [batch] * settings.accumulate, averaging=held.averaging)

    run()  # DistributedDataParallel arranges its messages in the first steps
    run()
    return _seen(run)


def _seen(run: object) -> Messages:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        run()  # type: ignore[operator]
    gathers = _bytes(profiled, "c10d::_allgather_base_", 0)
    scatters = _bytes(profiled, "c10d::_reduce_scatter_base_", 1)
    # gloo scatters by reducing all.
    return Messages(_bytes(profiled, "gloo:all_reduce", 0) - scatters, gathers, scatters)


def _bytes(profiled: profile, name: str, which: int) -> int:
    sizes = []
    for event in profiled.events() or ():
        if event.name == name:
            with contextlib.suppress(IndexError):
                sizes.append(4 * math.prod(event.input_shapes[which]))
    return sum(size for size in sizes if size >= SMALL)
