"""What a training step costs on several GPUs: bytes, which follow from the model, and seconds at stated rates.

docs/scale.md explains the model and tabulates it. Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from tamingfast.models.gpt import GPT
from tamingfast.models.losses import VQLPIPSWithDiscriminator
from tamingfast.models.shared import BatchNorm2d
from tamingfast.models.vqgan import VQModel
from tamingfast.training.settings import DDP

#: Bytes of a number in a message: gradients and weights are float32.
_NUMBER = 4
#: Passes of a GAN step through its discriminator: of the autoencoder, then of real and reconstructed images. The
#: autoencoder's goes backward twice, once for the adaptive weight.
_FORWARD, _BACKWARD = 3, 4


@dataclass(frozen=True)
class Messages:
    """Bytes that the collective operations of one step are given on each process; a gather's are those it returns."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def sent(self, processes: int) -> float:
        """Bytes that each process sends in a ring (Patarasuk and Yuan 2009), which is the least that is possible."""
        share = (processes - 1) / processes
        return share * (2 * self.all_reduce + self.all_gather + self.reduce_scatter)


def prior_messages(gpt: GPT, parallel: str = DDP, accumulate: int = 1) -> Messages:
    """The messages of a step of a prior, see `tamingfast.training.parallel`.

    With "fsdp" blocks are gathered forwards and backwards for each of the ``accumulate`` batches, what is outside of
    them once; sizes that the number of processes does not divide are padded, which is not counted.
    """
    whole, blocks = _bytes(gpt.parameters()), _bytes(gpt.blocks.parameters())
    if parallel == DDP:
        return Messages(all_reduce=whole)
    return Messages(all_gather=accumulate * (whole + blocks), reduce_scatter=whole)


def first_stage_messages(model: VQModel, accumulate: int = 1) -> Messages:
    """The messages of a step of a first stage whose discriminator learns, if it has one."""
    total = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    if isinstance(model.loss, VQLPIPSWithDiscriminator):
        layers = [module for module in model.loss.modules() if isinstance(module, BatchNorm2d)]
        statistics = sum((2 * layer.num_features + 1) * _NUMBER for layer in layers)
        total += accumulate * ((_FORWARD + _BACKWARD) * statistics + 2 * _bytes([model.get_last_layer()]))
    return Messages(all_reduce=total)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * _NUMBER for parameter in parameters)


@dataclass(frozen=True)
class Rates:
    """A cluster, as somebody states it.

    Attributes:
        operations: floating-point operations per second of a GPU, as a training step reaches them.
        within, between: bytes per second that a GPU sends to others of its machine, and over the network.
        gpus: GPUs in a machine.
        latency: seconds from a message's first byte to the next GPU.
    """

    operations: float
    within: float
    between: float
    gpus: int = 8
    latency: float = 1e-5

    def communication(self, messages: Messages, processes: int, count: int) -> float:
        """Seconds for ``count`` messages of these bytes, one after the other.

        The bytes are those of a ring; the steps that a message waits for are those of a tree there and back (Sanders et
        al. 2009), which libraries use for many processes.
        """
        slowest = self.within if processes <= self.gpus else self.between
        return messages.sent(processes) / slowest + count * 2 * math.ceil(math.log2(processes)) * self.latency


def operations(gpt: GPT, length: int) -> float:
    """Floating-point operations of a forward and backward pass over a sequence of ``length`` tokens.

    Six for each weight of a matrix and token, and attention's two products, forwards once and backwards twice.
    """
    weights = sum(module.weight.numel() for module in gpt.modules() if isinstance(module, nn.Linear))
    width = gpt.config.n_embd
    return 6.0 * weights * length + 12.0 * len(gpt.blocks) * width * length**2


def prior_step(
    gpt: GPT, length: int, batch: int, processes: int, rates: Rates, parallel: str = DDP, bucket: int = 25 << 20
) -> tuple[float, float]:
    """(seconds of computing, seconds of a step) with ``batch`` sequences on each process.

    Gradients are sent while the backward pass, two thirds of the computing, still computes others, all but those of the
    last ``bucket``; with "fsdp" weights are gathered beside the computing, all but the first block's.
    """
    messages = prior_messages(gpt, parallel)
    computing = batch * operations(gpt, length) / rates.operations
    if processes == 1:
        return computing, computing
    if parallel == DDP:
        count = math.ceil(messages.all_reduce / bucket)
        sending = rates.communication(messages, processes, count)
        behind, after = 2 / 3 * computing, sending / count
    else:
        count = 3 * (len(gpt.blocks) + 1)
        sending = rates.communication(messages, processes, count)
        behind, after = computing, sending / count
    return computing, computing + max(after, sending - behind)
