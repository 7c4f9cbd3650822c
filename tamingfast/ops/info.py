"""What this machine can run, in words: the text of ``tamingfast info``."""

from __future__ import annotations

import os

from tamingfast.ops import attention, backends, codes, norm
from tamingfast.ops.backends import Availability


def implementations() -> dict[str, tuple[str, ...]]:
    """The backends of each op, in the order in which the automatic choice considers them."""
    ops = (attention.CAUSAL_ATTENTION, norm.GROUP_NORM_SILU, codes.NEAREST_CODE, codes.QUANTIZE)
    return {op.name: op.backends for op in ops}


def describe() -> str:
    """The text of ``tamingfast info``: the machine, each backend and its ops, the CUDA engine, and the settings."""
    facts = backends.machine()
    lines = [
        f"python     {facts['python']} on {facts['platform']}",
        f"torch      {facts['torch']}, threads: {facts['threads']}, processors: {facts['cpu_count']}",
        f"cpu        {facts['cpu']} ({' '.join(facts['cpu_features']) or 'no known vector instructions'})",
        f"gpu        {facts['gpu']}",
    ]
    having = implementations()
    for name, state in backends.status().items():
        ops = ", ".join(op for op, names in having.items() if name in names)
        lines.append(f"{name:<10} {_yes_or_no(state)}" + (f" [{ops}]" if state.available else ""))
    lines.append(f"cuda engine {_yes_or_no(backends.cuda())}")
    for variable in ("TAMINGFAST_BACKEND", "TAMINGFAST_ISA"):
        lines.append(f"{variable} = {os.environ.get(variable) or 'not set, chosen by device and dtype'}")
    return "\n".join(lines)


def _yes_or_no(state: Availability) -> str:
    return f"{'yes' if state.available else 'no'}: {state.reason}"
