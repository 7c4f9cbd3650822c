"""The page's fields as arguments of tasks, and back."""

from __future__ import annotations

import pytest

from tamingfast.errors import UserError
from tamingfast.tasks import DrawingOptions
from tamingfast.ui.choices import Choices, whole


@pytest.mark.parametrize(
    "options",
    [
        DrawingOptions(),
        DrawingOptions(seed=2**64 - 1, temperature=0.7, top_k=None, top_p=0.9, schedule="block", stride=4),
        DrawingOptions(cfg=4.0, greedy=True, dtype="int8", batch=3),
        DrawingOptions(cfg="2.5:cosine"),
    ],
)
def test_fields_give_back_what_they_were_filled_with(options):
    assert Choices.of(options).options(options) == options


def test_fields_at_rest_are_the_defaults():
    assert Choices().options() == DrawingOptions()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", ""), ("seed", "-1"), ("seed", "many"), ("seed", "1e3"), ("seed", str(2**64)), ("seed", "9" * 5000),
        ("temperature", None), ("temperature", 0.0), ("temperature", float("nan")), ("top_k", -1), ("top_k", 1.5),
        ("top_k", None), ("top_p", 0.0), ("top_p", 2.0), ("cfg", -1.0), ("cfg", None), ("schedule", "none"),
        ("stride", 0), ("stride", float("inf")), ("stride", "two"), ("seed", True),
    ],
)  # fmt: skip
def test_a_sentence_names_the_field(field, value):
    with pytest.raises(UserError, match=f"^{field}: got "):
        Choices(**{field: value}).options()


def test_whole_numbers():
    assert [whole("x", value) for value in (3, 3.0, "3", " 3 ")] == [3, 3, 3, 3]
