"""A dot in place of the curves of a training, which take longer to draw than the steps of most tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from tamingfast import images
from tamingfast.training import plots


def _figure(columns: int, width: float, rows: int) -> tuple[None, list[mock.Mock]]:
    return None, [mock.Mock() for _ in range(columns * rows)]


def _save_figure(figure: None, path: Path) -> None:
    images.save_png(path, np.zeros((1, 1, 3), np.uint8))


#: Starts and stops drawing dots; all else that belongs to the curves is done as ever.
PLAIN = mock.patch.object(plots, "report", SimpleNamespace(figure=_figure, save_figure=_save_figure))
