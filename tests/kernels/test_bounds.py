"""The check that no kernel leaves its tensors: kernels with a wrong mask, made from the sources, do not pass it."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from guarded import guarded

from tamingfast.ops import backends

if not backends.interpreted():
    pytest.skip("addresses are checked in Triton's interpreter", allow_module_level=True)

import tamingfast.kernels

SOURCES = Path(tamingfast.kernels.__file__).parent


def attend(module: ModuleType, rng: torch.Generator) -> None:
    """Of views of one projection, whose end is not that of a tile."""
    projection = torch.randn(1, 21, 3, 2, 24, generator=rng).requires_grad_()
    module.causal_attention(*projection.permute(2, 0, 3, 1, 4).unbind(0), 5).sum().backward()


def normalise(module: ModuleType, rng: torch.Generator) -> None:
    x = torch.randn(1, 6, 3, 3, generator=rng)
    module.group_norm_silu(x, torch.ones(6), torch.zeros(6), 2, 1e-6, True)


def find(module: ModuleType, rng: torch.Generator) -> None:
    module.nearest_code(torch.randn(7, 20, generator=rng), torch.randn(40, 40, generator=rng)[:, ::2])


#: A file of kernels, what is right there, what is wrong, a call that shows it, and what the check says.
MISTAKES = {
    "writes past the end": (
        "causal_attention", "b_m + tl.log2(b_l), mask=o_m < T)", "b_m + tl.log2(b_l))",
        attend, "_forward_kernel writes lse at element",
    ),
    "writes beside the columns of a view": (
        "causal_attention", "tl.store(dk + o_kv, (b_dk * grad_scale).to(dk.dtype.element_ty), mask=m_kv)",
        "tl.store(dk + o_kv, (b_dk * grad_scale).to(dk.dtype.element_ty), mask=(o_n < T)[:, None])",
        attend, "_key_gradient_kernel writes dk",
    ),
    "reads past the last row": (
        "causal_attention", "m_kv = (n + o_n < T)[:, None] & m_d[None, :]\n            b_k, b_v",
        "m_kv = m_d[None, :]\n            b_k, b_v", attend, "_forward_kernel reads k at element",
    ),
    "writes one row too many": (
        "nearest_code", "m_r = o_r < R\n", "m_r = o_r <= R\n", find, "_split_kernel writes hi at element",
    ),
    "reads before the begin": (
        "nearest_code", "b_norm = tl.load(c_norm + n + o_n, mask=m_n, other=0.0)",
        "b_norm = tl.load(c_norm + n + o_n - 1, mask=m_n, other=0.0)", find, "_scan_kernel reads c_norm at element -1",
    ),
    "writes all of a tile": (
        "group_norm_silu", "_activate(b_y, SILU).to(out.dtype.element_ty), mask=mask)",
        "_activate(b_y, SILU).to(out.dtype.element_ty))", normalise, "_whole_forward_kernel writes out at element",
    ),
}  # fmt: skip


def planted(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of the kernels with the mistake, whose operators have names of their own."""
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.glob("*.py"):
        text = path.read_text()
        if path.stem == file:
            assert text.count(right) == 1, f"{path.name} has {text.count(right)} times, not once:\n{right}"
            text = text.replace(right, wrong)
        path.write_text(text.replace('"tamingfast::', f'"{folder.name}::'))
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_access_out_of_bounds_is_found(name, tmp_path, monkeypatch, rng):
    file, right, wrong, call, message = MISTAKES[name]
    package = planted(tmp_path / f"planted_{list(MISTAKES).index(name)}", file, right, wrong).name
    monkeypatch.syspath_prepend(tmp_path)
    try:
        module = importlib.import_module(f"{package}.{file}")
        with (
            guarded(importlib.import_module(f"{package}.common")),
            pytest.raises(Exception, match=message),
        ):
            call(module, rng)
    finally:
        for imported in [imported for imported in sys.modules if imported.split(".")[0] == package]:
            del sys.modules[imported]
