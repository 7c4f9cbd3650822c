"""A step reads nothing from its device, because a GPU would be waited for; it is read once in several steps."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

from tamingfast import load_model
from tamingfast.models import condition_stages
from tamingfast.training import acceleration
from tamingfast.training.health import Monitor
from tamingfast.training.prior_stage import PriorStage
from tamingfast.training.step import step

#: Functions of tensors whose result, or its shape, depends on their values, and so waits for them.
READERS = (
    "item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "nonzero", "unique",
    "masked_select", "equal", "allclose", "bincount",
)  # fmt: skip
#: What the functions above and the library's C++ code call.
OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero")


class _Functions(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        if name in READERS and "Tensor" in (resolve_name(function) or name):
            self.found[name] += 1
        return function(*arguments, **(options or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.name().partition(".")[0] in OPERATORS:
            self.found[operator.name()] += 1
        return operator(*arguments, **(options or {}))


def reads(run) -> Counter[str]:
    """How often ``run()`` read values of tensors, by function."""
    found: Counter[str] = Counter()
    with _Functions(found), _Operators(found):
        run()
    return found


def test_reads_are_seen():
    x = torch.arange(3.0)
    for look in (lambda: x[0].item(), lambda: float(x[0]), lambda: x.tolist(), lambda: x.nonzero(), lambda: bool(x[0])):
        assert sum(reads(look).values()) >= 1
    assert not reads(lambda: torch.where(x > 1, x, 0).sum())


@pytest.fixture(params=["vqgan", "vqgan shared", "prior"])
def stage(request, first_stage, tmp_path, monkeypatch):
    """A stage with the optimizers of a GPU; others read their own count of steps for each parameter."""
    monkeypatch.setattr(acceleration, "_FUSED", ("cpu",))
    monkeypatch.setattr(condition_stages, "_READ_ON", ())
    made = plain_stage(request.param, first_stage, tmp_path)
    acceleration.fuse(made.optimizers)
    return made


def plain_stage(name, first_stage, tmp_path):
    if name == "prior":
        run = tiny.train("prior", tmp_path / "prior", first_stage, steps=1)
        return PriorStage(load_model(run).train(), 1e-3, (4, 4))
    return tiny.vqgan_stage({"disc_start": 0}, shared=name == "vqgan shared")


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_reads_nothing(stage, clip):
    monitor, batches = Monitor(1e-3, "float32", every=4), [default_collate([tiny.Noise()[index] for index in range(4)])]
    checks = []

    def move(number: int) -> None:
        stage.model.global_step = number

        def check(loss, norm, values):
            monitor.check(number, loss, norm, values, batches)
            checks.append(number)

        step(stage.optimizers, stage.loss, batches, grad_clip=clip, check=check)

    move(0)  # what is made on first use
    for number in (1, 2):
        assert not (found := reads(lambda number=number: move(number))), found
    found = reads(lambda: move(3))
    assert found["tolist"] == len(stage.optimizers) and sum(found.values()) == found["tolist"]
    assert len(checks) == 4 * len(stage.optimizers)
