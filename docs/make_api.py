"""Writes docs/api.md: the public functions and classes of each package, with signatures and docstrings.

``python docs/make_api.py --check`` writes nothing and fails when the page is not what the docstrings say.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
#: Heading -> (module, names; None takes its ``__all__``).
SECTIONS: dict[str, tuple[str, list[str] | None]] = {
    "Models and checkpoints": ("tamingfast", None),
    "Tasks": (
        "tamingfast.tasks",
        [
            "sample",
            "edit",
            "outpaint",
            "complete",
            "reconstruct",
            "encode",
            "likelihood",
            "inspect",
            "recipe_of",
            "Drawing",
            "Completion",
            "Recipe",
        ],
    ),
    "Sampling": ("tamingfast.sampling", None),
    "Operations": ("tamingfast.ops", ["causal_attention", "nearest_code", "quantize", "group_norm_silu"]),
    "Engines": ("tamingfast.engines", None),
    "Data sets": ("tamingfast.data", ["build", "loader"]),
    "Training": ("tamingfast.training", None),
    "Evaluation": ("tamingfast.evaluation", None),
    "Several processes": ("tamingfast.ranks", ["world", "World", "in_turns", "is_first", "wait_for_all"]),
    "Cost of a training step": (
        "tamingfast.training.scaling",
        ["Rates", "Messages", "prior_messages", "first_stage_messages", "prior_step"],
    ),
}


def members(module: Any, names: list[str] | None) -> Iterator[tuple[str, Any]]:
    """(name, object) of each documented function and class."""
    for name in module.__all__ if names is None else names:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            yield name, value


def entry(module: str, name: str, value: Any) -> str:
    """One object as Markdown: its signature and its docstring, and those of a class's own public methods."""
    lines = [f"### `{module}.{name}`", "", "```python", signature(name, value), "```", "", text(value)]
    if inspect.isclass(value) and not issubclass(value, Exception):
        for method, function in vars(value).items():
            plain = function.__func__ if isinstance(function, classmethod | staticmethod) else function
            if not method.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
                lines += [
                    "",
                    f"#### `{name}.{method}`",
                    "",
                    "```python",
                    signature(method, plain),
                    "```",
                    "",
                    text(plain),
                ]
    return "\n".join(lines)


def signature(name: str, value: Any) -> str:
    """The call as it is written, a parameter a line where it is long."""
    try:
        written = str(inspect.signature(value))
    except (TypeError, ValueError):
        return name
    plain = readable(written)
    if len(name + plain) <= 100 or not inspect.signature(value).parameters:
        return name + plain
    parameters = [readable(str(one)) for one in inspect.signature(value).parameters.values()]
    kinds = [one.kind for one in inspect.signature(value).parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    lines = "".join(f"    {one},\n" for one in parameters)
    return f"{name}(\n{lines})" + plain[plain.rindex(")") + 1 :]


def readable(written: str) -> str:
    """Annotations without quotes, and functions as defaults by their names instead of their addresses."""
    return re.sub(r"<function (\S+) at 0x\w+>", r"\1", re.sub(r"(: |-> )'([^']*)'", r"\1\2", written))


def text(value: Any) -> str:
    """The docstring, kept as it is written: its lists of arguments are laid out by indentation."""
    written = inspect.getdoc(value) or ""
    head, _, rest = written.partition("\n\n")
    return head if not rest else f"{head}\n\n```text\n{rest}\n```"


def page() -> str:
    parts = ["# API", "", "Made from the docstrings by `make docs`; do not edit.", ""]
    for heading, (home, names) in SECTIONS.items():
        module = importlib.import_module(home)
        first = (inspect.getdoc(module) or "").partition("\n\n")[0]
        parts += [f"## {heading}", "", first, ""]
        parts += [entry(home, name, value) + "\n" for name, value in members(module, names)]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    made = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != made:
            sys.exit(f"{PAGE.name}: got a page older than the docstrings, expected the present one; run make docs")
    else:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
