"""What the processes of `forked` have in common, made before they are forked: imported by their server alone."""

from __future__ import annotations

import contextlib

import tiny

from tamingfast import UserError, data

with contextlib.suppress(UserError):  # without the packages of the photographs
    data.build(tiny.CROPS)
