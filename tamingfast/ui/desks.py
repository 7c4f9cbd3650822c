"""What each visitor has before them: the last drawing, the sheet that is painted on, and files to take away."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from tamingfast import tasks

#: Visitors whose things are kept; those who have been away for longest lose theirs.
VISITORS = 64


@dataclass
class Desk:
    """The things of one visitor.

    Attributes:
        folder: for the files that are shown or taken away.
        drawing: the last one of the tab Sample.
        recipe: of the picture that was opened there, while it can be repeated.
        sheet: of the tab Paint.
        boxes: of the tab Condition: name of the class, left, top, right, bottom, as shares of width and height.
        corner: the first corner of a box whose second is not chosen yet.
        stopping: set to end what is being drawn.
    """

    folder: Path
    drawing: tasks.Drawing | None = None
    recipe: tasks.Recipe | None = None
    sheet: tasks.Sheet | None = None
    boxes: list[tuple[str, float, float, float, float]] = field(default_factory=list)
    corner: tuple[float, float] | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def file(self, name: str) -> Path:
        """A path for a new file of this name, in a folder of its own."""
        return Path(tempfile.mkdtemp(dir=self.folder), name)


class Desks:
    """The desks by visitor, in a folder. May be used by several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._desks: OrderedDict[str, Desk] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, visitor: str) -> Desk:
        """The visitor's desk, a new one at the first time."""
        with self._lock:
            desk = self._desks.pop(visitor, None) or Desk(Path(tempfile.mkdtemp(dir=self.folder)))
            self._desks[visitor] = desk
            oldest = self._desks.popitem(last=False)[1] if len(self._desks) > VISITORS else None
        if oldest is not None:
            _cleared(oldest)
        return desk

    def leave(self, visitor: str) -> None:
        """Stop what is drawn for a visitor who has left, and forget their things."""
        with self._lock:
            desk = self._desks.pop(visitor, None)
        if desk is not None:
            _cleared(desk)


def _cleared(desk: Desk) -> None:
    desk.stopping.set()
    shutil.rmtree(desk.folder, ignore_errors=True)
