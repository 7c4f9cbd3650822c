"""Every error that a person meets has the form of CONTRIBUTING.md: name, got, expected, what to do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("tamingfast", "kernels") for path in (ROOT / folder).rglob("*.py"))
CHECKED = {"SettingError", "UserError", "ValueError", "TypeError"}
#: Sentences about what an object is, not about a value; the extension has the same one.
STATES = {"the engine is closed"}


def literal(node: ast.expr) -> str | None:
    """The text of a message with ``{}`` for its values, None when it is not written where the error is made."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = literal(node.left), literal(node.right)
        return "".join(side or "" for side in sides) if any(sides) else None
    return None


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHECKED and node.args:
            text = literal(node.args[0])
            if text is not None:
                yield node.lineno, text


def wrong(text: str) -> str | None:
    """What is not as it should be, None for a message of the right form.

    ``{}; ...`` adds advice to the sentence of another error.
    """
    if text in STATES or text.startswith("{}; "):
        return None
    got, expected = text.find("got "), text.find("expected ")
    if not 0 <= got < expected:
        return "lacks 'got ...' before 'expected ...'"
    if ": " not in text[:got] and not text.startswith("{}"):
        return "does not begin with a name and a colon"
    if text.endswith(".") and not text.endswith("..."):
        return "ends with a full stop"
    return None


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_messages_have_one_form(path: Path) -> None:
    found = [
        f"line {line}: {why}: {text}"
        for line, text in messages(ast.parse(path.read_text("utf-8")))
        if (why := wrong(text))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("top_k: got {}, expected at least 1", True),
        ("{}: got no file, expected a canvas; give its path", True),
        ("expected at least 1, got {}", False),
        ("got {}, expected at least 1", False),
        ("top_k is {}, but it must be at least 1", False),
        ("top_k: got {}, expected at least 1.", False),
    ],
)
def test_the_check_tells_right_from_wrong(text: str, right: bool) -> None:
    assert (wrong(text) is None) is right
