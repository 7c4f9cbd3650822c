"""How several processes hold the model that they train, and average its gradients.

A prior is held whole by each (`Replicated`, torch's DistributedDataParallel) or in parts (`Sharded`, torch's FSDP2). A
first stage is held whole and averaged here (`Averaged`), because DistributedDataParallel expects one backward pass per
step through one set of parameters: a GAN step has two, and differentiates twice more by the last layer for the adaptive
weight.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tamingfast.errors import UserError
from tamingfast.ranks import World
from tamingfast.training.averages import Averages
from tamingfast.training.prior_stage import PriorStage
from tamingfast.training.settings import FSDP, Training

#: Bytes of gradients in one message: large enough for the network's full rate, small enough to be sent while the
#: backward pass still computes others. DistributedDataParallel's own size.
BUCKET = 25 << 20


class Parallel(Protocol):
    """What a training step and a checkpoint need to know about the other processes."""

    def averaging(self, parameters: Sequence[Tensor], last: bool) -> AbstractContextManager[None]:
        """Contains a forward and a backward pass; after the ``last`` of a step, gradients are means over processes."""

    def gathered(self, tree: Any) -> Any:
        """``tree`` with whole tensors, on the first process; every process must call this."""

    def whole(self, averages: Averages | None) -> AbstractContextManager[bool]:
        """Inside, the first process, which gets True, can use the model alone; with its averages, if there are any.

        Every process must enter this, and must not use the model while it gets False.
        """


class Averaged:
    """Every process holds the whole model, and its gradients are averaged here."""

    def __init__(self, among: World) -> None:
        self.among = among
        self._made: dict[int, _Buckets] = {}

    def averaging(self, parameters: Sequence[Tensor], last: bool) -> AbstractContextManager[None]:
        """As in `Parallel`."""
        if self.among.size == 1 or not last:
            return nullcontext()
        key = id(parameters[0])
        if key not in self._made:
            self._made[key] = _Buckets(parameters, self.among.size)
        return self._made[key].averaging()

    def gathered(self, tree: Any) -> Any:
        """As in `Parallel`."""
        return tree

    @contextlib.contextmanager
    def whole(self, averages: Averages | None) -> Iterator[bool]:
        """As in `Parallel`."""
        first = self.among.rank == 0
        with averages.in_use() if first and averages is not None else nullcontext():
            yield first


class _Buckets:
    """Parameters in groups whose gradients are averaged in one message, while others are still computed.

    Gradients become known about from the last parameter to the first. All processes send the groups in this order,
    whatever the order in which they become complete.
    """

    def __init__(self, parameters: Sequence[Tensor], size: int) -> None:
        self.size = size
        self.groups: list[list[Tensor]] = []
        room = 0
        for parameter in reversed([parameter for parameter in parameters if parameter.requires_grad]):
            room -= parameter.nbytes
            if room < 0:
                self.groups.append([])
                room = BUCKET - parameter.nbytes
            self.groups[-1].append(parameter)
        self.group_of = {parameter: number for number, group in enumerate(self.groups) for parameter in group}

    @contextlib.contextmanager
    def averaging(self) -> Iterator[None]:
        self.missing = [len(group) for group in self.groups]
        self.sent: list[tuple[Tensor, Any]] = []
        hooks = [parameter.register_post_accumulate_grad_hook(self._known) for parameter in self.group_of]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if self.missing == [len(group) for group in self.groups]:
            return  # an optimizer that rests, on all processes
        while len(self.sent) < len(self.groups):
            self._send()
        for group, (flat, work) in zip(self.groups, self.sent, strict=True):
            work.wait()
            parts = (flat / self.size).split([parameter.numel() for parameter in group])
            pairs = [(p.grad, part.view_as(p)) for p, part in zip(group, parts, strict=True) if p.grad is not None]
            if pairs:
                torch._foreach_copy_([own for own, _ in pairs], [mean for _, mean in pairs])
        self.sent = []

    def _known(self, parameter: Tensor) -> None:
        self.missing[self.group_of[parameter]] -= 1
        while len(self.sent) < len(self.groups) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        group = self.groups[len(self.sent)]
        # Zeros where this step gives no gradient, so that messages have one length on all processes.
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        self.sent.append((flat, torch.distributed.all_reduce(flat, async_op=True)))


class Replicated(Averaged):
    """Every process holds the whole prior, and DistributedDataParallel averages its gradients."""

    def __init__(self, stage: PriorStage, among: World, accumulate: int) -> None:
        super().__init__(among)
        # A static graph is recorded in the first pass, which must not be one that leaves the averaging out.
        self.network = stage.network = DistributedDataParallel(
            stage.network, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=accumulate == 1
        )  # fmt: skip

    def averaging(self, parameters: Sequence[Tensor], last: bool) -> AbstractContextManager[None]:
        """As in `Parallel`."""
        return nullcontext() if last else self.network.no_sync()


class Sharded:
    """Each process holds a part of the transformer, of its gradients and of its optimizer's moments.

    A block's weights are gathered when it is reached, and dropped after it. The frozen stages are whole.
    """

    def __init__(self, stage: PriorStage, among: World, averages: Averages | None) -> None:
        self.model, self.among = stage.model, among
        whole = stage.model.transformer
        nothing = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in whole.parameters()}
        self._empty = copy.deepcopy(whole, nothing)  # copies of which `whole` gives weights
        before = dict(whole.named_parameters())
        mesh = init_device_mesh(among.device.type, (among.size,))
        for module in (*whole.blocks, whole):
            fully_shard(module, mesh=mesh, shard_placement_fn=lambda parameter: _divided(parameter, among.size))
        self.parts: FSDPModule = whole  # type: ignore[assignment]  # whose class `fully_shard` changes
        after = dict(whole.named_parameters())
        _replace(stage.optimizers, {before[name]: after[name] for name in before})
        if averages is not None:
            averages.follow(stage.averaged, _part)

    def averaging(self, parameters: Sequence[Tensor], last: bool) -> AbstractContextManager[None]:
        """As in `Parallel`."""
        self.parts.set_requires_gradient_sync(last)
        return nullcontext()

    def gathered(self, tree: Any) -> Any:
        """As in `Parallel`; tensors that were in parts are on the CPU."""
        first = self.among.rank == 0

        def whole(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            found = value.full_tensor()  # all take part
            return found.cpu() if first else None

        return torch.utils._pytree.tree_map(whole, tree)

    @contextlib.contextmanager
    def whole(self, averages: Averages | None) -> Iterator[bool]:
        """As in `Parallel`; the first process has the weights whole for as long."""
        prefix = "transformer."
        own = {} if averages is None else averages.values
        state = self.parts.state_dict() | {name.removeprefix(prefix): value for name, value in own.items()}  # type: ignore[attr-defined]
        state = self.gathered(state)
        if self.among.rank:
            yield False
            return
        lent, parts = copy.deepcopy(self._empty), self.model.transformer
        lent.load_state_dict({name: value.to(self.among.device) for name, value in state.items()}, assign=True)
        self.model.transformer = lent
        try:
            yield True
        finally:
            self.model.transformer = parts


def _replace(optimizers: Sequence[torch.optim.Optimizer], new: dict[Tensor, Tensor]) -> None:
    """Let the optimizers move the ``new`` parameters, with the parts of their moments."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new[parameter] for parameter in group["params"]]
        for parameter, kept in list(optimizer.state.items()):
            del optimizer.state[parameter]
            optimizer.state[new[parameter]] = {
                name: _part(value, new[parameter])
                if isinstance(value, Tensor) and value.shape == parameter.shape else value
                for name, value in kept.items()
            }  # fmt: skip


def _divided(parameter: Tensor, processes: int) -> Shard | None:
    """The first dimension that the processes divide; None for the first of all, in which parts are then padded.

    Position embeddings (1, n, width) would be as long as the processes are many.
    """
    return next((Shard(axis) for axis, length in enumerate(parameter.shape) if length % processes == 0), None)


def _part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all have, divided as ``like`` is."""
    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def parallel_prior(stage: PriorStage, settings: Training, among: World, averages: Averages | None) -> Parallel:
    """Distribute a prior, whose weights, optimizers and averages are the same on all processes, as the settings say."""
    if among.size == 1:
        return Averaged(among)
    if settings.parallel == FSDP:
        if settings.compile:
            raise UserError(
                "training.compile: got true beside training.parallel=fsdp, expected false; leave it out, or use "
                "training.parallel=ddp"
            )
        return Sharded(stage, among, averages)
    return Replicated(stage, among, settings.accumulate)
