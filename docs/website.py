"""A hook of MkDocs: the pages of the site that are made from other sources than the pages in docs/.

They exist only in the site, so nothing is committed twice: the README, CONTRIBUTING and CHANGELOG from the repository's
root, the commands from the parser, the benchmarks from ``benchmarks/results/``, and the API, whose page in docs/ names
the functions and classes, from their docstrings.
"""

from __future__ import annotations

import argparse
import html
import importlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tamingfast.cli import parser

ROOT = Path(__file__).resolve().parents[1]
#: Pages outside docs/, and where they are in the site.
BORROWED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
#: A line of docs/api.md: a package and the names that it documents.
_MEMBERS = re.compile(r"^`(tamingfast[\w.]*)`: ((?:`\w+`(?:, )?)+)$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and plots that are not in docs/."""
    from mkdocs.structure.files import File

    for source, target in BORROWED.items():
        written = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=relinked(written, source)))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    page, plots = benchmarks_page(results())
    page += gpu_tables(gpu_results())
    files.append(File.generated(config, "benchmarks.md", content=page))
    for name, drawn in plots.items():
        files.append(File.generated(config, name, content=drawn))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the pages of the site, and put docstrings in the place of names."""
    source = page.file.src_uri
    if source in {*BORROWED.values(), "commands.md", "benchmarks.md"}:
        return markdown
    return relinked(with_docstrings(markdown) if source == "api.md" else markdown, f"docs/{source}")


def relinked(markdown: str, source: str) -> str:
    """Markdown of the repository's file ``source`` with its links made for the site.

    Of links to files that are not in the site only the text is kept.
    """

    def replace(found: re.Match[str]) -> str:
        image, words, target = found[1], _LINK.sub(replace, found[2]), found[3]
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return found[0]
        place = os.path.normpath(PurePosixPath(source).parent / path)
        if place in BORROWED:
            place = f"docs/{BORROWED[place]}"
        elif not place.startswith("docs/") or place.endswith((".py", ".sh")):
            # What does not exist stays a link, which the strict build refuses.
            return words if (ROOT / place).exists() else found[0]
        return f"{image}[{words}]({place.removeprefix('docs/')}{mark}{anchor})"  # all pages are in one directory

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # code has no links
    return "".join(part if part.startswith("```") else _LINK.sub(replace, part) for part in parts)


# --- API --------------------------------------------------------------------------------------------------------------


def documented(markdown: str) -> Iterator[tuple[str, list[str]]]:
    """(package, names) of each line of docs/api.md that names functions and classes."""
    for found in _MEMBERS.finditer(markdown):
        yield found[1], re.findall(r"`(\w+)`", found[2])


def with_docstrings(markdown: str) -> str:
    """Markdown in which each of the names that `documented` finds stands for its docstring."""

    def entries(found: re.Match[str]) -> str:
        package = importlib.import_module(found[1])
        parts = []
        for name in re.findall(r"`(\w+)`", found[2]):
            value = getattr(package, name)  # found by its home, as packages import their members when they are used
            parts.append(f"::: {value.__module__}.{value.__qualname__}\n    options:\n      heading: {found[1]}.{name}")
        return "\n\n".join(parts)

    return _MEMBERS.sub(entries, markdown)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """All commands with their options, from the parser."""
    top = parser()
    parts = ["# Commands and options", "", "What `tamingfast COMMAND --help` prints."]
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    helps = {action.dest: action.help for action in commands._choices_actions}
    for name, command in commands.choices.items():
        parts += ["", *_command(name, command, helps.get(name) or "")]
    return "\n".join(parts) + "\n"


def _command(name: str, command: argparse.ArgumentParser, summary: str, level: int = 2) -> list[str]:
    lines = [f"{'#' * level} tamingfast {name}", ""]
    described = command.description or summary
    usage = re.sub(r"^(usage: |       )", "", command.format_usage().rstrip(), flags=re.MULTILINE)
    lines += [_plain(described), "", "```text", usage, "```", ""]
    formatter = command._get_formatter()
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner, parsed in action.choices.items():
                lines += ["", *_command(f"{name} {inner}", parsed, "", level + 1)]
        elif action.help != argparse.SUPPRESS and action.dest != "help":
            invocation = formatter._format_action_invocation(action)
            told = formatter._expand_help(action) if action.help else ""
            lines += [f"`{invocation}`", f":   {_plain(told) or '&nbsp;'}", ""]
    if command.epilog:
        lines += ["```text", command.epilog.strip(), "```"]
    return lines


def _plain(text: str) -> str:
    """Text as Markdown that shows it as it is, code between backticks included."""
    parts = " ".join(text.split()).split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([\\*_\[\]])", r"\\\1", html.escape(parts[index], quote=False))
    return "`".join(parts)


# --- benchmarks -------------------------------------------------------------------------------------------------------


def results() -> dict[str, dict[str, Any]]:
    """The recorded measurements by name, as `make bench RECORD=name` wrote them."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def gpu_results() -> list[dict[str, Any]]:
    """The recorded measurements on GPUs, one for each model of GPU, as `make gpu` wrote them."""
    files = sorted((ROOT / "benchmarks" / "results" / "gpu").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def gpu_tables(found: list[dict[str, Any]]) -> str:
    """For each GPU and benchmark a table of milliseconds, ours first, and of our share of the limit."""
    parts = []
    for run in found:
        limits = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in run["ceilings"].items())
        parts += ["", f"## {run['machine']['gpu']}", "", f"By `make gpu`. Limits measured in the same run: {limits}."]
        for benchmark in dict.fromkeys(row["benchmark"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["benchmark"] == benchmark]
            names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
            parts += ["", f"### {benchmark.replace('_', ' ').capitalize()}, milliseconds", ""]
            parts += [f"| case | {' | '.join(names)} | share of the limit |", "|---" * (len(names) + 2) + "|"]
            for row in rows:
                times = (row["milliseconds"].get(name) for name in names)
                shown = " | ".join("" if time is None else _number(time) for time in times)
                parts.append(f"| {row['case']} | {shown} | {row['share_of_ceiling']:.0%} |")
    return "\n".join(parts) + "\n"


def benchmarks_page(found: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, bytes]]:
    """A page with a plot and a table of each group of measurements, and the plots by their paths, as SVG."""
    parts = [
        "# Benchmarks",
        "",
        "Drawn from the figures in `benchmarks/results/`, which `make bench RECORD=name` writes. Each was compared "
        "with its baseline within one run; the pages on [lookahead](lookahead.md), the "
        "[first stage](first-stage.md) and [large images](large-images.md) explain what is compared and have later "
        "figures.",
    ]
    plots = {}
    for test, runs in sorted(_by_test(found).items()):
        rows = [row for _, benchmarks in runs for row in benchmarks]
        quantity, unit = _quantity(rows)
        path = f"assets/benchmarks/{test}.svg"
        plots[path] = _bars([_label(row, test) for row in rows], [_figure(row, quantity) for row in rows], unit)
        title = test.replace("_", " ")
        machines = sorted({_machine(run) for run, _ in runs})
        parts += ["", f"## {title[0].upper()}{title[1:]}", "", f"![{unit}]({path})", "", *_table(rows, test)]
        parts += ["", f"Measured on {'; '.join(machines)}."]
    return "\n".join(parts) + "\n", plots


def _by_test(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[Any, list[Any]]]]:
    groups: dict[str, list[tuple[Any, list[Any]]]] = {}
    for run in sorted(found.values(), key=lambda run: str(run["datetime"])):
        for test in sorted({_test(row) for row in run["benchmarks"]}):
            groups.setdefault(test, []).append((run, [row for row in run["benchmarks"] if _test(row) == test]))
    return groups


def _test(row: Mapping[str, Any]) -> str:
    return row["name"].partition("[")[0].removeprefix("test_")


def _label(row: Mapping[str, Any], test: str) -> str:
    case = row["name"].removeprefix(f"test_{test}").strip("[]")
    values = row["params"] or {}
    if case != "-".join(map(str, values.values())):
        return case or test
    return ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in values.items())


#: What a plot shows: the first of these that all rows of a test have.
_QUANTITIES = {
    "tokens_per_second": "tokens per second",
    "ratio_to_original": "times as fast as the original's loop",
    "ratio_to_best_rival": "times as fast as the best rival",
}


def _quantity(rows: list[Any]) -> tuple[str, str]:
    for name, words in _QUANTITIES.items():
        if all(isinstance(row["extra_info"].get(name), int | float) for row in rows):
            return name, words
    return "median", "seconds, median"


def _figure(row: Mapping[str, Any], name: str) -> float:
    return float(row["stats"]["median"] if name == "median" else row["extra_info"][name])


def _table(rows: list[Any], test: str) -> Iterator[str]:
    """Every number that all rows have, as columns."""
    names = [
        name for name in rows[0]["extra_info"]
        if all(isinstance(row["extra_info"].get(name), int | float) for row in rows)
    ]  # fmt: skip
    yield "| case | " + " | ".join(name.replace("_", " ") for name in names) + " | seconds, median |"
    yield "|---" * (len(names) + 2) + "|"
    for row in rows:
        values = [*(row["extra_info"][name] for name in names), row["stats"]["median"]]
        yield f"| {_label(row, test)} | " + " | ".join(map(_number, values)) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _machine(run: Mapping[str, Any]) -> str:
    about = run["machine_info"]
    processor = about.get("cpu", {}).get("brand_raw") or about["machine"]
    return f"{processor}, {about.get('cpu', {}).get('count', '?')} cores, {str(run['datetime'])[:10]}"


def _bars(labels: list[str], values: list[float], unit: str) -> bytes:
    with matplotlib.rc_context({"svg.hashsalt": unit, "font.size": 10, "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 0.8 + 0.36 * len(labels)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(labels, values, color="#4051b5")
        axes.bar_label(bars, list(map(_number, values)), padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()
