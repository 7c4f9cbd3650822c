"""What the documentation shows works: the walk of the first day runs, commands exist, snippets define what they use."""

from __future__ import annotations

import ast
import builtins
import shlex
import subprocess
import sys

import pytest
from documented import PAGES, ROOT, code, commands

from tamingfast import cli

WALK = ROOT / "docs" / "first-day.md"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_have_these_options(page):
    for line in commands(page):
        words = shlex.split(line.partition(" > ")[0])[1:]
        if "--help" not in words:
            assert cli._parse(words).run, line


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "python.md", WALK], ids=lambda page: page.name)
def test_snippets_define_every_name_that_they_use(page):
    tree = ast.parse(code(page, "python"))
    defined = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} <= defined


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_walk_of_the_first_day(tmp_path):
    pytest.importorskip("skimage")
    walk = [sys.executable, str(WALK.with_name("first_day.py")), "--quick", "--offline", "--directory", str(tmp_path)]
    done = subprocess.run(walk, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr  # no bars where there is no terminal
    for name in ("reconstructed", "samples", "wide", "completed", "wider", "edited", "drawn"):
        assert (tmp_path / f"{name}.png").is_file()
