"""The pages of the site that are made from other sources, and whether all of the repository's pages are in it."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from tamingfast.cli import parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def website():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("website", DOCS / "website.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(website):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    listed = pages(settings["nav"])
    made = {*website.BORROWED.values(), "commands.md", "benchmarks.md"}
    assert sorted(listed) == sorted({page.name for page in DOCS.glob("*.md")} | made)


def test_links_lead_to_pages_of_the_site(website):
    said = (
        "[a](docs/training.md#options) ![b](docs/samples.png) [c](CHANGELOG.md) [d](https://x.org/y.md) [e](#here)\n"
        "[`f`](docs/first_day.py) [![g](docs/samples.png)](docs/training.md) [h](missing.md)\n"
        "```bash\n[i](docs/training.md)\n```"
    )
    assert website.relinked(said, "README.md") == (
        "[a](training.md#options) ![b](samples.png) [c](changelog.md) [d](https://x.org/y.md) [e](#here)\n"
        "`f` [![g](samples.png)](training.md) [h](missing.md)\n"
        "```bash\n[i](docs/training.md)\n```"
    )
    assert website.relinked("[a](../CONTRIBUTING.md) [b](api.md)", "docs/architecture.md") == (
        "[a](contributing.md) [b](api.md)"
    )


def test_the_api_page_names_what_packages_export(website):
    pages = dict(website.documented((DOCS / "api.md").read_text(encoding="utf-8")))
    assert len(pages) > 5
    for package, names in pages.items():
        module = importlib.import_module(package)
        assert all(inspect.getdoc(getattr(module, name)) for name in names), package
        exported = [name for name in getattr(module, "__all__", names) if callable(getattr(module, name))]
        if package not in ("tamingfast.tasks", "tamingfast.ops", "tamingfast.data"):  # which export helpers, too
            assert sorted(names) == sorted(exported), package
    made = website.with_docstrings((DOCS / "api.md").read_text(encoding="utf-8"))
    assert "::: tamingfast.tasks.sampling.sample\n    options:\n      heading: tamingfast.tasks.sample\n" in made
    assert made.count("\n::: ") == sum(map(len, pages.values()))


def test_the_commands_page_has_every_command_and_option(website):
    page = website.commands_page()
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert len(commands.choices) > 10
    for name, command in commands.choices.items():
        assert f"\n## tamingfast {name}\n" in page
        section = page.partition(f"\n## tamingfast {name}\n")[2].partition("\n## ")[0]
        for action in command._actions:
            if action.help != argparse.SUPPRESS and action.dest != "help":
                assert all(option in section for option in action.option_strings), (name, action.dest)


def test_tables_of_gpus_have_every_row(website):
    found = website.gpu_results()
    page = website.gpu_tables(found)
    for row in (row for run in found for row in run["rows"]):
        line = re.search(rf"^\| {re.escape(row['case'])} \|(.*)\|$", page, re.M)
        assert line and website._number(row["milliseconds"]["ours"]) in line.group(1)


def test_benchmarks_are_drawn_from_their_records(website):
    found = website.results()
    assert found
    page, plots = website.benchmarks_page(found)
    assert set(re.findall(r"\((assets/[^)]+)\)", page)) == set(plots)
    for run in found.values():
        for row in run["benchmarks"]:
            median = website._number(row["stats"]["median"])
            assert re.search(rf"^\| {re.escape(website._label(row, website._test(row)))} \|.* {median} \|$", page, re.M)
    assert all(drawn.startswith(b"<?xml") and b"<svg" in drawn for drawn in plots.values())
    faster = json.loads(json.dumps(found))
    first = next(iter(faster.values()))["benchmarks"][0]
    first["extra_info"]["tokens_per_second"] = 98765.0
    page, redrawn = website.benchmarks_page(faster)
    assert "| 98,765 |" in page and redrawn != plots
