"""Which of its configurations each launch takes, in a table that can be kept and restored. Needs no Triton.

A configuration decides in which order a kernel adds, and so the last bits of its results. Whoever must repeat a
computation bit for bit keeps the table (`made`) and restores it (`adopt`); a training run does so in its checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

#: Whether configurations are measured; with TAMINGFAST_TUNE=0 every launch takes its first.
TUNED = os.environ.get("TAMINGFAST_TUNE") != "0"

# What determines a launch, as a name -> the index of its configuration.
_table: dict[str, int] = {}


def made() -> dict[str, int]:
    """A copy of the table: for each launch so far, the index of its configuration."""
    return dict(_table)


def adopt(table: Mapping[str, int]) -> None:
    """Let launches take the configurations of ``table``, which `made` returned, in this or an earlier process.

    They count more than what was chosen before. Entries of other devices or versions of a kernel have no effect.
    """
    _table.update(table)


def known(launch: str, count: int) -> int | None:
    """The index of the configuration that ``launch`` takes, out of ``count``; None if it has not been chosen."""
    index = _table.get(launch, -1)
    return index if 0 <= index < count else None


def remember(launch: str, index: int) -> None:
    """Let ``launch`` take the configuration ``index`` from now on."""
    _table[launch] = index
