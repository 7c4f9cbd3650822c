"""The settings of `sample_grid` that decide the tokens: their types and ranges, as far as no model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from tamingfast.engines.selection import check_names
from tamingfast.errors import UserError, brief
from tamingfast.ops.choice import Choice
from tamingfast.sampling.guidance import check_cfg
from tamingfast.sampling.schedule import check_rule

#: Their names, in the order of `sample_grid`, and the types that each may have.
KINDS: dict[str, tuple[type, ...]] = {
    "window": (Integral,),
    "schedule": (str,),
    "stride": (Integral,),
    "temperature": (Real,),
    "top_k": (Integral, type(None)),
    "top_p": (Real, type(None)),
    "greedy": (bool,),
    "seed": (Integral,),
    "first_image": (Integral,),
    "dtype": (str, type(None)),
    "cfg": (Real, str, type(None)),
}
#: Those that a model can recommend, in the section ``sampling`` of its config.
RECOMMENDED = ("temperature", "top_k", "top_p", "schedule", "stride", "cfg")
_WORDS = {Integral: "a whole number", Real: "a number", str: "text", bool: "true or false", type(None): "none"}
_LARGEST = (1 << 32) - 1  # images are numbered, and tokens placed, in 32 bits


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError, which begins with the setting's name, for an unknown one and for a value that none can have."""
    for name, value in settings.items():
        if name not in KINDS:
            raise UserError(f"{name}: got a setting that does not exist, expected one of {', '.join(KINDS)}")
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and bool not in KINDS[name]):
            raise UserError(f"{name}: got {value!r}, expected {' or '.join(_WORDS[kind] for kind in KINDS[name])}")
    for name in ("window", "stride", "first_image"):
        if not 0 <= settings.get(name, 0) <= _LARGEST:
            raise UserError(f"{name}: got {settings[name]}, expected a number of at most 32 bits")
    check_rule(settings.get("schedule", "paper"), settings.get("window", _LARGEST), settings.get("stride", 1))
    check_names(dtype=settings.get("dtype"))
    check_cfg(settings.get("cfg"))
    choosing = ("temperature", "top_k", "top_p", "greedy", "seed")
    Choice(**{name: settings[name] for name in choosing if name in settings})


def recommended(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the section ``sampling`` of a model's config, some of `RECOMMENDED`; empty without that section.

    Raises UserError for other settings, and for a value that none can have.
    """
    section = config.get("sampling")
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise UserError(f"sampling: got {brief(section)}, expected settings such as {{cfg: 3, top_k: null}}")
    for name in section:
        if name not in RECOMMENDED:
            raise UserError(
                f"sampling.{brief(name)}: got a setting that no model recommends, expected some of "
                f"{', '.join(RECOMMENDED)}"
            )
    try:
        check_settings(section)
    except UserError as error:
        told = f"sampling.{error}"
        raise UserError(f"{told}; change that section of the config") from error
    return dict(section)
