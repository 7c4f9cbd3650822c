"""TensorBoard events of a run, with the optional package tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tamingfast.errors import UserError, first_line

FOLDER = "tensorboard"


class Events:
    """Writes the values of a run in ``out`` below ``out/tensorboard``, as scalars named split/value.

    A run that continues at ``step`` replaces what was recorded after it.
    """

    def __init__(self, out: Path, step: int):
        self._writer: Any = writer_class()(str(out / FOLDER), purge_step=step + 1 if step else None)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Record ``values`` of a ``split``."""
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def writer_class() -> Any:
    """The class that writes events; UserError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # needs an optional package
    except ImportError as error:
        raise UserError(
            f"training.tensorboard: got '{first_line(error)}' on importing tensorboard, expected the package; run "
            "'pip install tensorboard', or leave training.tensorboard out"
        ) from error
    return SummaryWriter
