"""nearest_code against torch's own operators, each at its best chunk size, and against published kernels."""

from __future__ import annotations

import functools

import gpu
import pytest
import torch

from tamingfast import ops

ROWS_PER_CHUNK = (2048, None)  # None: the whole N x K matrix at once
LARGEST_MATRIX = 2**30  # bytes; a whole matrix larger than this is left out


def cdist(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.cdist(z, codebook).argmin(1)


def addmm(z: torch.Tensor, codebook: torch.Tensor, half_norms: torch.Tensor) -> torch.Tensor:
    return torch.addmm(half_norms, z, codebook.t(), alpha=-1).argmin(1)


def in_chunks(formula, z: torch.Tensor, rows: int | None) -> torch.Tensor:
    return torch.cat([formula(chunk) for chunk in z.split(rows or len(z))])


def torch_formulas(z: torch.Tensor, codebook: torch.Tensor) -> dict:
    rivals = {}
    for rows in ROWS_PER_CHUNK:
        if (rows or len(z)) * len(codebook) * z.element_size() > LARGEST_MATRIX:
            continue
        suffix = f", {rows} rows" if rows else ", whole"
        rivals[f"cdist{suffix}"] = lambda rows=rows: in_chunks(lambda chunk: cdist(chunk, codebook), z, rows)

        def expanded(rows: int | None = rows) -> torch.Tensor:
            half_norms = codebook.square().sum(1) / 2
            return in_chunks(lambda chunk: addmm(chunk, codebook, half_norms), z, rows)

        rivals[f"addmm{suffix}"] = expanded
    return rivals


def validate(index: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor) -> None:
    """For a sample of rows, the chosen code is the nearest in float64."""
    sample = torch.linspace(0, len(z) - 1, 512, device=z.device).long()
    distance = torch.cdist(z[sample].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distance.gather(1, index[sample, None]).squeeze(1)
    torch.testing.assert_close(chosen, distance.min(1).values, rtol=1e-5, atol=0)


@pytest.mark.quick(n=65536, k=512)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(256, 1024, 256), (65536, 1024, 256), (65536, 16384, 256), (65536, 512, 3)],
    ids=["one image", "batch", "batch, large codebook", "pixels to 512 colours"],
)
def test_nearest_code(compare, n, k, d):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, d, generator=generator)
    codebook = torch.randn(k, d, generator=generator)
    ours = functools.partial(ops.nearest_code, z, codebook)
    rivals = torch_formulas(z, codebook)
    for run in (ours, *rivals.values()):
        validate(run(), z, codebook)
    compare(ours, rivals, "cpu", flop=2 * n * k * d, size=4 * (n * d + k * d) + 8 * n, rounds=3)


def peers(codebook: torch.Tensor) -> dict:
    """The published quantizers that are installed, each as a function from z to indices."""
    found = {}
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        pass
    else:
        k, d = codebook.shape
        layer = VectorQuantize(dim=d, codebook_size=k).to(codebook.device).eval()
        with torch.no_grad():
            layer._codebook.embed.copy_(codebook[None])
        found["vector-quantize-pytorch"] = lambda z: layer(z[None])[1][0]
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    except ImportError:
        pass
    else:
        found["flash-kmeans"] = lambda z: euclid_assign_triton(z[None], codebook[None], z.square().sum(1)[None])[0]
    return found


def sampled(run, z: torch.Tensor, codebook: torch.Tensor, tolerance: float) -> bool:
    """Whether the codes of a sample of rows are nearest in float64, up to the relative ``tolerance``."""
    rows = torch.linspace(0, len(z) - 1, 512, device=z.device).long()
    distance = torch.cdist(z[rows].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distance.gather(1, run(z)[rows, None].long()).squeeze(1)
    return bool((chosen <= distance.min(1).values * (1 + tolerance)).all())


@pytest.mark.gpu
@pytest.mark.quick(n=65536, k=1024)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(4096, 1024, 256), (65536, 1024, 256), (262144, 1024, 256), (65536, 16384, 256), (262144, 16384, 16),
     (65536, 512, 3), (262144, 512, 3)],
)  # fmt: skip
def test_nearest_code_on_a_gpu(n, k, d):
    """cdist and the matrix product use float32 like the kernel; peers may be less exact, which validation allows.

    "scan alone" is ours without the float64 search of what the scan leaves open.
    """
    from tamingfast.kernels import nearest_code as kernel

    codebook = torch.randn(k, d, device="cuda")
    inputs = [torch.randn(n, d, device="cuda") for _ in range(gpu.copies_past_cache(4 * n * d))]
    rows = min(n, LARGEST_MATRIX * 4 // (4 * k))

    def matmul(z: torch.Tensor) -> torch.Tensor:
        half_norms = codebook.square().sum(1) / 2
        return in_chunks(lambda chunk: addmm(chunk, codebook, half_norms), z, rows)

    def ours(z: torch.Tensor) -> torch.Tensor:
        return ops.nearest_code(z, codebook)

    def milliseconds(run) -> float:
        assert sampled(run, inputs[0], codebook, 1e-12 if run is ours else 1e-2)
        return gpu.milliseconds(run, inputs)

    case, work = f"{n} x {k} x {d}", {"flop": 2.0 * n * k * d, "size": 4 * d * (n + k) + 8 * n}
    work["host"] = {"ours": gpu.host_milliseconds(ours, inputs)}
    gpu.record("nearest_code", f"{case}, parts", {"ours": milliseconds(ours), "scan alone": gpu.milliseconds(
        lambda z: kernel._scan(z, codebook)[1], inputs)}, [], **work)  # fmt: skip
    exact = {"cdist": lambda z: in_chunks(lambda chunk: cdist(chunk, codebook), z, rows)}
    others = {"matmul": matmul, "matmul, compiled": torch.compile(matmul, dynamic=False)} | peers(codebook)
    for suffix, rivals, target in (("", exact, 3.0), (", others", others, 1.2)):
        timed = {name: functools.partial(milliseconds, run) for name, run in rivals.items()}
        mine = functools.partial(milliseconds, ours)
        gpu.compare("nearest_code", f"{case}{suffix}", mine, timed, target=target, **work)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [12, 64])
def test_quantizer_step_on_a_gpu(batch):
    """Search, straight-through estimate, both losses, counts, and the gradients of z and the codebook."""
    from tamingfast.ops import backends

    shape = (batch, 256, 16, 16)
    codebook = torch.randn(1024, 256, device="cuda", requires_grad=True)
    size = 4 * batch * 256 * 256
    inputs = [torch.randn(shape, device="cuda", requires_grad=True) for _ in range(gpu.copies_past_cache(size))]

    def step(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z_q, _, to_codes, to_latents, _ = ops.quantize(z, codebook)
        return torch.autograd.grad(z_q.sum() + to_codes + 0.25 * to_latents, (z, codebook))

    def definition(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with backends.use("reference"):
            return step(z)

    for got, true in zip(step(inputs[0]), definition(inputs[0]), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-6)
    times = {"ours": gpu.milliseconds(step, inputs), "torch, float64 search": gpu.milliseconds(definition, inputs)}
    host = {"ours": gpu.host_milliseconds(step, inputs)}
    gpu.record("quantize", f"batch {batch}, forward + backward", times, list(times)[1:], size=5 * size, host=host)
