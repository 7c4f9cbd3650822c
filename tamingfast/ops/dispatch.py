"""Chooses the implementation that runs an op. Each one says whether it can take the given arguments and, if not, why.

The automatic choice takes the first that can, in the order that the op gives for the arguments, and logs once why an
earlier one could not. If the user requested a backend (:mod:`tamingfast.ops.backends`) that implements the op, only
that one is considered, and RuntimeError gives the reason if it cannot run. torch.compile traces all of this without a
graph break.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

import torch

from tamingfast.errors import SettingError
from tamingfast.ops import backends

logger = logging.getLogger("tamingfast")

P = ParamSpec("P")
R = TypeVar("R")

#: Backends that the automatic choice considers only for tensors on one type of device.
_HOME = {"triton": "cuda", "native": "cpu", "cudnn": "cuda"}


@dataclass(frozen=True)
class Implementation(Generic[P, R]):
    """An op on one backend.

    Attributes:
        backend: a name of `backends.PROBES`.
        run: the op's function.
        refusal: called with the arguments of `run`; returns why it cannot take them, or None if it can. Omitted if
            `run` accepts everything that the op accepts.
    """

    backend: str
    run: Callable[P, R]
    refusal: Callable[P, str | None] | None = None

    def why_not(self, device: str, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """Why it cannot run these arguments on tensors of that device type; None if it can."""
        if reason := _unavailable(self.backend, device):
            return reason
        return self.refusal(*args, **kwargs) if self.refusal else None


@dataclass(frozen=True)
class Op(Generic[P, R]):
    """An op with its implementations.

    Attributes:
        name: for messages.
        implementations: the preferred one first; the last refuses nothing.
        automatic: called with the arguments of `run`; returns the backends that the automatic choice tries, in this
            order, of which the last refuses nothing. Omitted if it tries all in the order of `implementations`.
    """

    name: str
    implementations: tuple[Implementation[P, R], ...]
    automatic: Callable[P, tuple[str, ...]] | None = None

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends that have the op, in the same order."""
        return tuple(implementation.backend for implementation in self.implementations)

    def run(self, device: torch.device, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op with checked arguments on ``device``. RuntimeError if the requested backend cannot run it."""
        asked = backends.requested()
        refusals: list[tuple[str, str]] = []
        order = (asked,) if asked in self.backends else self._automatic(device.type, *args, **kwargs)
        for implementation in (each for name in order for each in self.implementations if each.backend == name):
            reason = implementation.why_not(device.type, *args, **kwargs)
            if reason is None:
                for backend, why in refusals:
                    _log_fallback(self.name, backend, implementation.backend, why)
                return implementation.run(*args, **kwargs)
            refusals.append((implementation.backend, reason))
        backend, reason = refusals[-1]
        raise SettingError(
            f"{backends.requested_by()}: got {backend!r}, which cannot run {self.name} ({reason}), expected one that "
            "can; ask for another"
        )

    def _automatic(self, device: str, *args: P.args, **kwargs: P.kwargs) -> list[str]:
        order = self.automatic(*args, **kwargs) if self.automatic else self.backends
        return [backend for backend in order if _HOME.get(backend, device) == device]


# torch.compile evaluates the two functions below while it traces, instead of tracing into them.
@torch.compiler.assume_constant_result
def _unavailable(backend: str, device: str) -> str | None:
    """Why the backend cannot run here, or on tensors of that device type; None if it can."""
    state = backends.PROBES[backend]()
    if not state.available:
        return state.reason
    expected = "cpu" if backend == "triton" and backends.interpreted() else _HOME.get(backend, device)
    return None if device == expected else f"its kernels are for {expected} tensors here, got tensors on {device}"


@torch.compiler.assume_constant_result
def _log_fallback(op: str, refused: str, chosen: str, reason: str) -> None:
    _log_once(op, refused, chosen, reason)


@functools.cache
def _log_once(op: str, refused: str, chosen: str, reason: str) -> None:
    logger.warning("%s runs on the %s backend instead of %s: %s", op, chosen, refused, reason)
