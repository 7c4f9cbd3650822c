"""Module names of earlier versions, so that old imports and the targets in saved configs keep working.

The table holds strings only. Imports of ``tamingfast.<old name>`` use it, and so does `tamingfast.checkpoints.compat`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

#: old name -> new name, both below ``tamingfast.``; an old package and its modules each have an entry.
RENAMED: dict[str, str] = {
    "apply": "tasks",
    "apply.conditioning": "tasks.conditioning",
    "apply.drawing": "tasks.drawing",
    "apply.encoding": "tasks.encoding",
    "apply.measuring": "tasks.reconstruction",
    "apply.models": "tasks.models",
    "apply.photos": "tasks.pictures",
    "apply.sizes": "tasks.sizes",
    "backends": "ops.backends",
    "config": "checkpoints.config",
    "cuda_engine": "engines.cuda",
    "cuda_engine.checks": "engines.request",
    "cuda_engine.engine": "engines.cuda.engine",
    "cuda_engine.loop": "engines.cuda.step",
    "cuda_engine.rows": "engines.cuda.rows",
    "cuda_engine.weights": "engines.cuda.weights",
    "data.batches": "data.loading",
    "data.kinds": "data.conditions",
    "data.scenes": "data.conditions.scenes",
    "engine": "engines",
    "evaluation.quality": "evaluation.generated",
    "inspection": "tasks.inspection",
    "losses": "models.losses",
    "models.bands": "engines.bands",
    "models.conditioning": "models.condition_stages",
    "multiscale": "models.pyramid",
    "orderings": "models.orderings",
    "perceptual": "models.lpips",
    "reference": "ops.reference",
    "sampling.filters": "ops.choice",
    "training.checkpoint": "checkpoints.run_directory",
    "training.color_clusters": "training.colors",
    "weights": "checkpoints.weights",
}


def new_name(module: str) -> str:
    """The current dotted name for an old one of this package; any other name unchanged."""
    package, _, rest = module.partition(".")
    return f"{package}.{RENAMED[rest]}" if package == __package__ and rest in RENAMED else module


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the current module under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        known = new_name(fullname)
        return None if known == fullname else importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(new_name(spec.name))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import machinery has just replaced it with the old name's spec


def install() -> None:
    """Make old names importable. Called once, when the package is imported."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        # First in the list: any other finder would load a module below an old package a second time.
        sys.meta_path.insert(0, _OldNames())
