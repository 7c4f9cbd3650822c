"""kernels/ works outside the package: it imports only torch, Triton, the standard library and itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "kernels"
FILES = sorted(FOLDER.rglob("*.py"))
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}


def imported(node: ast.stmt) -> list[str]:
    """Top-level packages that a statement imports; a single dot, which is kernels/ itself, gives none."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level == 1:
            return []
        return [(node.module or "").partition(".")[0] if node.level == 0 else "." * node.level]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kernels_import_nothing_of_ours_but_themselves(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {name for node in ast.walk(tree) if isinstance(node, ast.stmt) for name in imported(node)}
    assert found <= ALLOWED


def test_there_are_kernels_to_read():
    assert {"causal_attention.py", "group_norm_silu.py", "nearest_code.py"} <= {path.name for path in FILES}
