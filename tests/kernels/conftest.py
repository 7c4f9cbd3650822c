"""The device of the kernels' tests: a GPU, or with TRITON_INTERPRET=1 the CPU, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from guarded import guarded

from tamingfast.ops import backends


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if backends.interpreted() else "cuda")


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    """In the interpreter a kernel that leaves its tensors fails."""
    if not backends.interpreted():
        yield
        return
    from tamingfast.kernels import common  # needs Triton

    with guarded(common):
        yield


@pytest.fixture
def on_triton() -> Iterator[None]:
    """Every op in the test runs on Triton or raises."""
    with backends.use("triton"):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, or the largest integer, so that elements a kernel does not write show up."""

    def poison(allocate):
        def wrapped(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max)

        return wrapped

    new_empty = torch.Tensor.new_empty
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
