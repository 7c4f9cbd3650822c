"""What this machine can run, as facts and in words: what ``tamingfast info`` prints."""

from __future__ import annotations

import os
from typing import Any

from tamingfast.ops import attention, backends, codes, norm
from tamingfast.ops.backends import Availability


def implementations() -> dict[str, tuple[str, ...]]:
    """The backends of each op, the preferred one first; the last runs everything."""
    ops = (attention.CAUSAL_ATTENTION, norm.GROUP_NORM_SILU, codes.NEAREST_CODE, codes.QUANTIZE)
    return {op.name: op.backends for op in ops}


def facts() -> dict[str, Any]:
    """The machine, each backend with its ops, the CUDA engine and the settings, in values of JSON."""
    having = implementations()
    found = {
        name: _state(state) | {"ops": [op for op, names in having.items() if name in names]}
        for name, state in backends.status().items()
    }
    settings = {
        name: os.environ.get(name) or None for name in ("TAMINGFAST_BACKEND", "TAMINGFAST_ISA", "TAMINGFAST_TUNE")
    }
    return {
        "machine": backends.machine(), "backends": found, "cuda_engine": _state(backends.cuda()), "settings": settings,
    }  # fmt: skip


def describe() -> str:
    """`facts` as the text of ``tamingfast info``."""
    found = facts()
    machine = found["machine"]
    lines = [
        f"python     {machine['python']} on {machine['platform']}",
        f"torch      {machine['torch']}, threads: {machine['threads']}, processors: {machine['cpu_count']}",
        f"cpu        {machine['cpu']} ({' '.join(machine['cpu_features']) or 'no known vector instructions'})",
        f"gpu        {machine['gpu']}",
    ]
    for name, state in found["backends"].items():
        lines.append(
            f"{name:<10} {_yes_or_no(state)}" + (f" [{', '.join(state['ops'])}]" if state["available"] else "")
        )
    lines.append(f"cuda engine {_yes_or_no(found['cuda_engine'])}")
    for variable, value in found["settings"].items():
        lines.append(f"{variable} = {value or 'not set'}")
    return "\n".join(lines)


def _state(state: Availability) -> dict[str, Any]:
    return {"available": state.available, "reason": state.reason}


def _yes_or_no(state: dict[str, Any]) -> str:
    return f"{'yes' if state['available'] else 'no'}: {state['reason']}"
