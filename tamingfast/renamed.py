"""Module names that earlier versions had: old imports and the targets of saved configs keep working.

Strings only. The table is read when an import of ``tamingfast.<old name>`` finds no module, and by
`tamingfast.checkpoints.compat.resolve`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

#: old name -> new name, both below ``tamingfast.``; modules below an old package are listed themselves.
RENAMED: dict[str, str] = {
    "apply": "tasks",
    "apply.conditioning": "tasks.conditions",
    "apply.drawing": "tasks.drawing",
    "apply.encoding": "tasks.encode",
    "apply.measuring": "tasks.reconstruct",
    "apply.models": "tasks.models",
    "apply.photos": "tasks.pictures",
    "apply.sizes": "tasks.sizes",
    "backends": "ops.backends",
    "compat": "checkpoints.compat",
    "config": "checkpoints.config",
    "cuda_engine": "engines.cuda",
    "cuda_engine.checks": "engines.request",
    "cuda_engine.engine": "engines.cuda.engine",
    "cuda_engine.loop": "engines.cuda.step",
    "cuda_engine.rows": "engines.cuda.rows",
    "cuda_engine.weights": "engines.cuda.weights",
    "data.batches": "data.loading",
    "data.kinds": "data.conditions.kinds",
    "data.scenes": "data.conditions.scenes",
    "engine": "engines.cpu",
    "evaluation.quality": "evaluation.generated",
    "inspection": "tasks.inspect",
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
    """Today's dotted name of a module of this package; any other name as it is."""
    package, _, rest = module.partition(".")
    return f"{package}.{RENAMED[rest]}" if package == __package__ and rest in RENAMED else module


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module of today for the name of yesterday; the last finder, so it costs nothing while none is used."""

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
        module.__spec__ = self._spec  # the import machinery has just replaced it by that of the old name


def install() -> None:
    """Make old names importable. Called once, when the package is imported."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
