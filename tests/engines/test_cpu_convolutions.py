"""The extension's convolutions, with everything that is fused into them, against float64 torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tamingfast.ops import backends, check

NATIVE, WHY = backends.native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=WHY)
ISAS = NATIVE.build_info()["isas"] if NATIVE is not None else []


@dataclass
class Case:
    """A convolution with its input (images, height, width, channels) and what is fused into it."""

    inner: int = 32
    out: int = 32
    height: int = 9
    width: int = 13
    images: int = 1
    kernel: int = 3
    stride: int = 1
    method: str = "winograd4"
    upsample: bool = False
    act: str = ""  # "norm" or "silu"
    residual: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        maker = torch.Generator().manual_seed(self.seed)
        normal = lambda *shape: torch.randn(*shape, generator=maker)  # noqa: E731
        self.x = normal(self.images, self.height, self.width, self.inner)
        self.weight = normal(self.out, self.inner, self.kernel, self.kernel) / math.sqrt(self.inner * self.kernel**2)
        self.bias = normal(self.out)
        self.scale = normal(self.images, self.inner) + 1 if self.act else None
        self.shift = normal(self.images, self.inner) if self.act else None
        self.padding = self.kernel // 2 if self.stride == 1 else 0
        self.shape = self.reference(torch.float32).shape[1:3]
        self.skip = normal(self.images, *self.shape, self.out) if self.residual else None

    def reference(self, dtype: torch.dtype) -> Tensor:
        x = self.x.to(dtype)
        if self.scale is not None:
            x = x * self.scale.to(dtype)[:, None, None] + self.shift.to(dtype)[:, None, None]
            x = F.silu(x) if self.act == "silu" else x
        x = x.permute(0, 3, 1, 2)
        if self.upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        after = self.padding if self.stride == 1 else 1
        x = F.pad(x, (self.padding, after) * 2)
        out = F.conv2d(x, self.weight.to(dtype), self.bias.to(dtype), stride=self.stride).permute(0, 2, 3, 1)
        skip = getattr(self, "skip", None)
        return out if skip is None else out + skip.to(dtype)

    def run(self, isa: str = "auto", threads: int = 2, bands: bool = False, images: slice = slice(None)) -> Result:
        x, skip = self.x[images].contiguous(), None if self.skip is None else self.skip[images].contiguous()
        scale, shift = (None if t is None else t[images].contiguous() for t in (self.scale, self.shift))
        conv = NATIVE.Convolution(
            array(self.weight), array(self.bias), self.out, self.inner, self.kernel, self.stride, self.method,
            threads, isa,
        )  # fmt: skip
        height, width = self.shape
        out = torch.full((len(x), height, width, self.out), math.nan)
        blocks = math.ceil(height / conv.blocks[0]) * math.ceil(width / conv.blocks[1])
        moments = torch.full((len(x), blocks, 3, self.out), math.nan) if self.out % 16 == 0 else None
        step = conv.blocks[0] if bands else height
        for top in range(0, height, step):
            bottom = min(top + step, height)
            band = torch.full((len(x), bottom - top, width, self.out), math.nan)
            part = None if skip is None else skip[:, top:bottom].contiguous()
            first, last = top * self.stride - self.padding, (bottom - 1) * self.stride - self.padding + self.kernel
            if self.upsample:
                first, last = first // 2, -(-last // 2)
            first, last = max(first, 0), min(last, self.height)
            source = x[:, first:last].contiguous()  # exactly the rows that the band needs
            conv.run(
                len(x), array(source), first, last - first, self.height, self.width, array(band), height, width,
                top, bottom, self.padding, self.upsample, array(scale), array(shift), self.act == "silu",
                array(part), array(moments), threads,
            )  # fmt: skip
            out[:, top:bottom] = band
        return Result(out, moments, conv.blocks)


@dataclass
class Result:
    out: Tensor
    moments: Tensor | None
    blocks: tuple[int, int]

    def equals(self, other: Result) -> bool:
        same = self.moments is None or torch.equal(self.moments, other.moments)
        return same and torch.equal(self.out, other.out)


def array(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else check.array("array", tensor, torch.float32)


CASES = [
    Case(act="silu", residual=True),
    Case(inner=64, out=48, height=33, width=50, act="silu"),
    Case(height=1, width=1),
    Case(height=2, width=70, upsample=True),
    Case(method="winograd2", inner=64, height=11, width=19, act="silu", residual=True),
    Case(inner=16, out=3, height=30, width=21, act="silu"),
    Case(inner=384, out=384, height=16, width=9, images=3, act="silu", residual=True),  # threads share the tiles
    Case(inner=384, out=352, height=15, width=22, method="winograd", act="silu"),
    Case(inner=48, out=80, height=70, width=135, method="winograd"),  # several blocks of tiles, half a step of channels
    Case(method="patches", inner=3, height=31, width=54),
    Case(method="patches", inner=33, out=5, height=5, width=130, act="silu"),
    Case(method="patches", kernel=1, height=7, width=99, residual=True),
    Case(method="patches", kernel=1, out=96, act="norm"),
    Case(method="patches", stride=2, height=16, width=14),
    Case(method="patches", stride=2, height=17, width=15, images=2),
    Case(method="patches", inner=5, upsample=True, act="silu"),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_convolution_is_torchs(case, isa):
    expected = case.reference(torch.float64)
    torchs = (case.reference(torch.float32) - expected).abs().max()
    allowed = max(torchs.item(), 2e-6 * expected.abs().max().item())
    assert (case.run(isa).out - expected).abs().max() <= 4 * allowed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_of_many_terms_hardly_round(isa, kernel):
    """They go in groups: added one after the other, 4,608 terms round to 18 units of the last place, 512 to 7."""
    case = Case(inner=512, height=6, width=6, kernel=kernel, method="patches")
    expected = case.reference(torch.float64)
    unit = 2**-24 * (expected - case.bias).square().mean().sqrt()
    assert (case.run(isa).out - expected).square().mean().sqrt() <= 5 * unit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_blocks_of_a_convolution_are_known_before_it_is_made(case, isa):
    sizes = case.out, case.inner, case.kernel, case.stride, case.method
    planned = NATIVE.Convolution.planned_blocks(*sizes, isa)
    assert planned == NATIVE.Convolution(array(case.weight), None, *sizes, 1, isa).blocks


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_bands_and_other_images_change_no_bit(case, isa):
    whole = case.run(isa)
    assert whole.equals(case.run(isa, threads=1)) and whole.equals(case.run(isa, threads=5))
    assert whole.equals(case.run(isa, bands=True))
    alone = case.run(isa, images=slice(case.images - 1, case.images))
    assert torch.equal(alone.out, whole.out[-1:])
    assert alone.moments is None or torch.equal(alone.moments, whole.moments[-1:])


@settings(deadline=None, max_examples=40)
@given(
    st.builds(
        Case, inner=st.sampled_from([16, 48]), out=st.sampled_from([1, 16, 40]), height=st.integers(1, 40),
        width=st.integers(1, 40), images=st.integers(1, 3), upsample=st.booleans(), residual=st.booleans(),
        method=st.sampled_from(["winograd", "winograd4", "winograd2", "patches"]),
        act=st.sampled_from(["", "norm", "silu"]), seed=st.integers(0, 1000),
    )
)  # fmt: skip
def test_any_shape(case):
    test_a_convolution_is_torchs(case, "auto")
    assert case.run(threads=3).equals(case.run(bands=True, threads=1))


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("method", ["winograd4", "patches"])
def test_moments_give_the_group_normalisation(method, offset):
    """Also far from zero, where a plain sum of squares would lose the variance."""
    case = Case(out=64, height=37, width=29, images=2, method=method)
    case.bias += offset
    result = case.run()
    gain, bias = torch.rand(64) + 0.5, torch.randn(64)
    scale, shift = torch.full((2, 2, 64), math.nan)
    NATIVE.normalisation(
        array(result.moments), 2, 37, 29, 64, result.blocks, 32, 1e-6, array(gain), array(bias), array(scale),
        array(shift),
    )  # fmt: skip
    wide = result.out.double().permute(0, 3, 1, 2)
    expected = F.group_norm(wide, 32, gain.double(), bias.double(), eps=1e-6).permute(0, 2, 3, 1)
    got = result.out.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 if offset else 1e-5)


def test_not_a_number_stays_in_reach_and_stays_one():
    case = Case(height=16, width=16, act="silu")
    case.x[0, 8, 8, 3] = math.nan
    wrong = case.run().out.isnan().any(-1)[0]
    assert wrong[7:10, 7:10].all()
    assert not wrong[:4].any() and not wrong[:, 12:].any()  # a transform's tile is 6 x 6


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"method": "winograd", "kernel": 1}, "method"),
        ({"method": "other"}, "method"), ({"kernel": 1}, "method"), ({"inner": 12}, "in"), ({"stride": 2}, "method"),
        ({"kernel": 5, "method": "patches"}, "kernel"), ({"out": 0}, "out"), ({"out": 1 << 40}, "out"),
    ],
)  # fmt: skip
def test_impossible_convolutions_are_refused(change, name):
    sizes = {"out": 16, "inner": 16, "kernel": 3, "stride": 1, "method": "winograd4"} | change
    weight = torch.zeros(sizes["out"] % 2048, sizes["inner"], sizes["kernel"], sizes["kernel"])
    with pytest.raises(ValueError, match=f"^{name}"):
        NATIVE.Convolution(
            array(weight), None, sizes["out"], sizes["inner"], sizes["kernel"], sizes["stride"], sizes["method"], 1
        )
    with pytest.raises(ValueError, match=f"^{name}"):
        NATIVE.Convolution.planned_blocks(
            sizes["out"], sizes["inner"], sizes["kernel"], sizes["stride"], sizes["method"]
        )


ROOM = torch.zeros(32, 32, 16)


def part(rows: int) -> tuple[int, int]:
    """The first rows of an array of 32 x 32 pixels of 16 channels."""
    return array(ROOM[:rows])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"top": 3}, "out"), ({"top": 3, "out": part(29)}, "top"), ({"bottom": 5, "out": part(5)}, "bottom"),
        ({"bottom": 40}, "bottom"), ({"x_rows": 3}, "x: "), ({"x_rows": 3, "x": part(3)}, "rows"),
        ({"x_first": 2}, "first"), ({"x_first": -1}, "first"), ({"x_rows": 33}, "x: "), ({"threads": 0}, "threads"),
        ({"x": (0, 65536)}, "x"), ({"out": (0, 65536)}, "out"), ({"out": part(31)}, "out"), ({"images": 2}, "x: "),
        ({"width": 1 << 40}, "width"), ({"images": -1}, "images"), ({"scale": (64, 64)}, "shift"),
        ({"scale": (64, 60)}, "scale"), ({"width": 60}, "out"), ({"moments": (64, 64)}, "moments"),
    ],
)  # fmt: skip
def test_calls_that_would_leave_their_arrays_are_refused(change, name):
    weight, x = torch.zeros(16, 16, 3, 3), torch.zeros(32, 32, 16)
    conv = NATIVE.Convolution(array(weight), None, 16, 16, 3, 1, "winograd4", 1)
    arguments = dict(
        images=1, x=array(x), x_first=0, x_rows=32, x_height=32, x_width=32, out=array(x), height=32, width=32, top=0,
        bottom=32, padding=1, upsample=False, scale=None, shift=None, silu=False, residual=None, moments=None,
        threads=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=name):
        conv.run(**arguments | change)
