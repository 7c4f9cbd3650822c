"""What makes the same steps cheaper: less memory for activations, and compiled networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from tamingfast.errors import UserError, first_line
from tamingfast.models.autoencoder import Decoder, Encoder
from tamingfast.models.discriminator import NLayerDiscriminator
from tamingfast.models.gpt import GPT
from tamingfast.training.settings import Training

#: The networks that take most of a step's time.
_NETWORKS = (Encoder, Decoder, NLayerDiscriminator, GPT)
#: Types of devices on which convolutions are faster with the channels last, and on which optimizers are fused. On a CPU
#: both would change the last bits of a step.
_CHANNELS_LAST = _FUSED = ("cuda",)


def accelerate(model: nn.Module, settings: Training) -> None:
    """Change how the networks of ``model`` in training mode run, as the settings say; their weights stay in place.

    With ``gradient_checkpointing`` the backward pass computes activations inside blocks again instead of keeping them:
    the same gradients, bit for bit, for one more forward pass. With ``compile`` torch.compile translates the networks,
    which takes a while in the first step; it changes results by rounding, and which numbers dropout draws. On a GPU the
    convolutions keep their weights with the channels last, as its matrix units take them. Raises UserError if it
    cannot.
    """
    networks = [module for module in model.modules() if isinstance(module, _NETWORKS) and module.training]
    for network in networks:
        on_gpu = all(parameter.device.type in _CHANNELS_LAST for parameter in network.parameters())
        if on_gpu and not isinstance(network, GPT):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.gradient_checkpointing:
        for module in (part for network in networks for part in network.modules()):
            if hasattr(module, "checkpointing"):
                module.checkpointing = True  # type: ignore[assignment]
    if settings.compile:
        _check_compiler()
        # The adaptive weight goes through the graph a second time, so no buffer may be given away in the first.
        torch._functorch.config.donated_buffer = False
        for network in networks:
            network.compile()


def fuse(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Let Adam and AdamW move all parameters of a group on a GPU in one kernel; for new optimizers, before `begin`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            devices = {parameter.device.type for parameter in group["params"]}
            if isinstance(optimizer, torch.optim.Adam) and devices <= set(_FUSED) and devices:  # AdamW is one
                group.update(fused=True, foreach=False)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import

    try:
        get_cpp_compiler()
    except Exception as error:  # of torch, whose classes change
        raise UserError(
            f"training.compile: got true without a C++ compiler ({first_line(error)}), expected one on the path; "
            "install it, or leave training.compile out"
        ) from error


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Raises UserError for an error of torch's compilers, which run when a compiled network is first called."""
    try:
        yield
    except Exception as error:
        if not any(_is_of_compilers(kind) for kind in type(error).__mro__):
            raise
        reason = first_line(getattr(error, "inner_exception", error))
        raise UserError(
            f"training.compile: got true, but torch could not compile the networks ({reason}), expected a compiler "
            "that works and has room for its files; leave training.compile out"
        ) from error


def _is_of_compilers(kind: type) -> bool:
    # Dynamo's other errors are those of the networks themselves.
    return kind.__module__.startswith("torch._inductor") or kind.__name__ == "BackendCompilerFailed"
