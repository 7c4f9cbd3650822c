"""GroupNorm and SiLU on Triton against the definition in float64, forward and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from tamingfast import ops
from tamingfast.ops import backends, reference

pytestmark = [
    pytest.mark.usefixtures("on_triton", "poisoned"),
    # NumPy's, from the interpreter; the sigmoid is then 0.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
if not backends.interpreted():
    pytestmark.append(pytest.mark.gpu)

# Shape and groups; groups of the first four fit into one program, the others are cut into pieces.
SHAPES = {
    "one pixel": ((1, 6, 1, 1), 2),
    "one channel to a group": ((2, 5, 3, 3), 5),
    "32 groups of odd maps": ((1, 64, 5, 3), 32),
    "12 channels to a group": ((3, 36, 7, 9), 3),
    "pieces": ((2, 12, 50, 41), 2),
    "groups across channel tiles": ((1, 72, 13, 29), 3),
    "one group of one channel": ((2, 1, 101, 103), 1),
    "a column": ((1, 6, 2999, 1), 1),
    "many channels, few positions": ((1, 4100, 3, 1), 1),
}
REPRESENTATIVE = {"12 channels to a group", "pieces"}
DTYPES = [torch.float32, torch.bfloat16]  # float16 differs by no line of the kernel
if not backends.interpreted():
    DTYPES.append(torch.float16)
    SHAPES |= {"VQGAN at 256": ((2, 128, 256, 256), 32), "VQGAN at 16": ((4, 512, 16, 16), 32)}


def cases() -> list:
    """Every shape in float32 with SiLU; the other dtypes, and no SiLU, on one shape of each path unless exhaustive."""
    made = []
    for name, channels_last, dtype, silu in itertools.product(SHAPES, (False, True), DTYPES, (True, False)):
        single = dtype == torch.float32
        usual = (silu and single) or (name in REPRESENTATIVE and (silu or single))
        layout, activation = "channels last" if channels_last else "contiguous", "SiLU" if silu else "plain"
        marks = () if usual else pytest.mark.exhaustive
        made.append(
            pytest.param(
                *SHAPES[name], channels_last, dtype, silu, id=f"{name}, {layout}, {dtype}, {activation}", marks=marks
            )
        )
    return made


@pytest.mark.parametrize(("sizes", "groups", "channels_last", "dtype", "silu"), cases())
def test_output_and_gradients(rng, device, sizes, groups, channels_last, dtype, silu):
    """The bound: twice the error of torch's own operators in that dtype, plus two roundings."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (2 * torch.randn(sizes, generator=rng) + 3).to(device, dtype).contiguous(memory_format=layout)
    weight, bias = (torch.randn(sizes[1], generator=rng).to(device, dtype) for _ in range(2))
    grad = torch.randn(sizes, generator=rng).to(device, dtype)

    def run(function, precision):
        inputs = [t.detach().to(precision).requires_grad_() for t in (x, weight, bias)]
        out = function(*inputs, groups=groups, silu=silu)
        return out, *torch.autograd.grad(out, inputs, grad.to(precision))

    ours, own = run(ops.group_norm_silu, dtype), run(reference.group_norm_silu, dtype)
    exact = run(reference.group_norm_silu, torch.float64)
    assert ours[0].is_contiguous(memory_format=layout)
    eps = torch.finfo(dtype).eps
    for name, got, torchs, true in zip(("y", "dx", "dw", "db"), ours, own, exact, strict=True):
        true = true.detach()
        error, bound = (float((value.detach().double() - true).abs().max()) for value in (got, torchs))
        bound = 2 * bound + 4 * eps * float(true.abs().max()) + 1e-7
        assert error <= bound, f"{name}: {error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("images", "forward", "backward"), [(5, 3, 5), (2, 1, 2), (1, 1, 1)])
def test_chunks_of_images_that_fit_the_cache(rng, device, monkeypatch, images, forward, backward, channels_last):
    from tamingfast.kernels import group_norm_silu as kernel

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(images, 12, 50, 41, generator=rng).to(device).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(12, generator=rng).to(device).requires_grad_() for _ in range(2))
    grad = torch.randn(images, 12, 50, 41, generator=rng).to(device)
    launched = []
    monkeypatch.setattr(
        kernel, "launch", lambda *args, launch=kernel.launch: (launched.append(args[0].__name__), launch(*args))
    )

    def results() -> tuple:
        launched.clear()
        out = ops.group_norm_silu(x, weight, bias, groups=2)
        return out, *torch.autograd.grad(out, (x, weight, bias), grad)

    whole = results()
    assert launched.count("_moments_kernel") == launched.count("_gradient_sums_kernel") == 1
    monkeypatch.setattr(kernel, "_CACHE_SHARE", 0.5)
    monkeypatch.setattr(kernel, "cache_bytes", lambda device: 2 * (2 * x[0].nbytes + 1))  # half: two images
    for ours, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
        assert ours.stride() == expected.stride()
    assert launched.count("_moments_kernel") == forward
    assert launched.count("_gradient_sums_kernel") == backward
    monkeypatch.setattr(kernel, "cache_bytes", lambda device: 1000)  # not even one
    for ours, expected in zip(results(), whole, strict=True):
        assert torch.equal(ours, expected)


def test_a_large_mean_does_not_cancel_the_variance(rng, device):
    x = torch.randn(1, 4, 70, 70, generator=rng).to(device) + 1e4
    out = ops.group_norm_silu(x, torch.ones(4, device=device), torch.zeros(4, device=device), groups=2, silu=False)
    exact = torch.nn.functional.group_norm(x.double(), 2, eps=1e-6)
    assert (out.double() - exact).abs().max() < 3e-3  # one step of float32 at 1e4 is 1e-3 of the deviation


def test_half_inputs_with_float32_weights_and_autocast_stay_half(rng, device):
    x = torch.randn(2, 8, 4, 4, generator=rng).to(device, torch.bfloat16)
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    assert ops.group_norm_silu(x, weight, bias, groups=4).dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16):
        assert ops.group_norm_silu(x, weight, bias, groups=4).dtype == torch.bfloat16


def test_strides_of_neither_layout_and_gradients_of_another(rng, device):
    x = torch.randn(2, 8, 6, 10, generator=rng).to(device)[:, :, ::2, 1:].requires_grad_()
    weight, bias = torch.randn(2, 8, generator=rng).to(device)
    grad = torch.randn(2, 9, 3, 8, generator=rng).to(device).permute(0, 3, 2, 1)
    out, exact = (f(x, weight, bias, groups=4) for f in (ops.group_norm_silu, reference.group_norm_silu))
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    actual, expected = (torch.autograd.grad(value, x, grad)[0] for value in (out, exact))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_no_images(device):
    x = torch.zeros(0, 4, 3, 3, device=device)
    assert (
        ops.group_norm_silu(x, torch.ones(4, device=device), torch.zeros(4, device=device), groups=2).shape == x.shape
    )


def test_float64_is_refused_with_the_reason(device):
    x, weight = torch.zeros(1, 4, 2, 2, device=device).double(), torch.ones(4, device=device).double()
    with pytest.raises(RuntimeError, match="cannot run group_norm_silu .*float64"):
        ops.group_norm_silu(x, weight, weight, groups=2)


def test_registered_as_torch_expects(rng, device):
    from tamingfast.kernels import group_norm_silu as kernel

    x, weight, bias = (
        torch.randn(shape, generator=rng).to(device).requires_grad_() for shape in ((2, 4, 3, 3), (4,), (4,))
    )
    torch.library.opcheck(kernel._forward, (x, weight, bias, 2, 1e-6, True))
