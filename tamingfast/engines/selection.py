"""Chooses the engine that samples, and says why another one cannot. Nothing else makes this choice."""

from __future__ import annotations

import functools
import logging

from tamingfast import engines
from tamingfast.engines.networks import Transformer
from tamingfast.errors import UserError
from tamingfast.ops import backends
from tamingfast.ops.machine import check_precision

#: "native": the extension's engine for the transformer's device; "torch": torch with a static key/value cache; "naive":
#: the paper's full forward pass for every token; "auto": the fastest of these that can run.
ENGINES = ("auto", "native", "torch", "naive")
DTYPES = ("float32", "bfloat16", "float16", "int8")

logger = logging.getLogger(__name__)


def choose_engine(engine: str, gpt: Transformer, dtype: str | None) -> tuple[str, str]:
    """(engine, weights' dtype) that will sample: "native", "torch" or "naive", and a name of `DTYPES`.

    Args:
        engine: one of `ENGINES`.
        dtype: one of `DTYPES`, or None for the transformer's own.

    Raises:
        UserError: an unknown name, or a device, engine or dtype that is not available here, with the reason.
    """
    check_names(engine, dtype)
    own = next(gpt.parameters())
    check_precision(own.device)
    name = str(own.dtype if dtype is None else dtype).removeprefix("torch.")
    reason = engines.refusal(gpt)
    if reason is None and name not in engines.dtypes(gpt):
        reason = f"it has no {name} weights"
    if engine == "native" and reason is not None:
        raise UserError(f"engine: got 'native', which cannot run here ({reason}), expected one that can; use 'auto'")
    if engine == "auto" and backends.requested() == "reference":
        reason = "the torch reference was asked for"
    elif engine == "auto" and reason is not None and own.is_cuda:
        log_once(f"Sampling runs in torch instead of the CUDA engine: {reason}.")
    if engine == "native" or (engine == "auto" and reason is None):
        return "native", name
    if name == "int8":
        why = reason or f"the engine is {engine!r}"
        raise UserError(
            f"dtype: got 'int8', expected another one, as only the native engine has it ({why}); use bfloat16"
        )
    return "torch" if engine == "auto" else engine, name


def check_names(engine: object = "auto", dtype: object = None) -> None:
    """Raise UserError unless these are names of an engine and, if it is not None, of a dtype."""
    if engine not in ENGINES:
        raise UserError(f"engine: got {engine!r}, expected one of {', '.join(ENGINES)}")
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise UserError(f"dtype: got {name!r}, expected one of {', '.join(DTYPES)}, or None for the model's own")


@functools.cache
def log_once(message: str) -> None:
    """Log a warning, each distinct message only once."""
    logger.warning(message)
