"""Races in the CUDA engine's kernels, found on the CPU: by ThreadSanitizer, and by results that depend on the order."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import on_host
import pytest
import torch
from engine_cases import Place, decoded
from gpts import random_gpt
from on_host import PLAIN, SHIM, compiled, linked
from race_detector import Mistake, objects, races


def without(file: str, right: str, case: str, source: str = "", dtype: str = "float32") -> Mistake:
    """The last barrier in a piece of a source is missing."""
    before, barrier, after = right.rpartition("__syncthreads();")
    assert barrier
    return Mistake(file, right, before + ";" + after, case, source, dtype)


MISTAKES = {
    "block_sum, while sums are read": without(
        "device.h", "++warp) total += scratch[warp];\n  __syncthreads();", "rows", "rows.cu"
    ),
    "arrival counted before all have written": without(
        "attention.cu", "  __syncthreads();\n  if (threadIdx.x == 0) *answer =", "attention"
    ),
    "arrival counted without order": Mistake(
        "attention.cu", "add_acq_rel(arrived, 1u)", "atomicAdd(arrived, 1u)", "attention"
    ),
    "row read before the previous kernel's end": Mistake(
        "attention.cu",
        "attention_kernel(AttentionParams p) {\n  lead();\n  follow();",
        "attention_kernel(AttentionParams p) {\n  lead();",
        "decoding",
    ),
    "sums of warps read before they are written": without(
        "linear.cu", "of_warps[threadIdx.x / kWarp * N + index + i] = values[i];\n  __syncthreads();", "linear"
    ),
    "sums of warps read before they are written, in tiles": without(
        "linear_tiles.cu", "parts[1] = even[1] + odd[1];\n  }\n  __syncthreads();", "linear", dtype="bfloat16"
    ),
    "gain read before all have copied it": Mistake(
        "linear_tiles.cu",
        "wait<kStages>();  // before the barrier that lets other threads read them\n  __syncthreads();",
        "wait<kStages + 1>();\n  __syncthreads();\n  copies.template wait<kStages>();",
        "linear",
        dtype="bfloat16",
    ),
    "sequence written while it is read": without(
        "choose.cu", "token = 0;  // the error is reported, so any valid token will do\n  __syncthreads();", "choose"
    ),
}
MORE = {
    "parts of a block read before they are written": without(
        "attention.cu", "shared.out[group][first + j] = out[j];\n  __syncthreads();", "attention"
    ),
    "threshold overwritten while it is read": without(
        "choose.cu", "at.key = shared.key, at.above = shared.above;\n    __syncthreads();", "choose"
    ),
    "block_sum, before sums are read": without(
        "device.h", "scratch[threadIdx.x / kWarp] = value;\n  __syncthreads();", "rows", "rows.cu"
    ),
    "answer read before it is written": without("attention.cu", "+ 1 == active;\n  __syncthreads();", "attention"),
    "inputs read before the previous kernel's end": Mistake(
        "linear.cu", "  follow();\n  load_inputs(0);", "  load_inputs(0);\n  follow();", "decoding"
    ),
    "tiles read before the previous kernel's end": Mistake(
        "linear_tiles.cu", "  lead();\n  follow();", "  lead();", "decoding", dtype="bfloat16"
    ),
    "digits cleared while they are counted": without(
        "choose.cu", "if (threadIdx.x == 0) shared.found = 0;\n    __syncthreads();", "choose"
    ),
    "digits read while they are counted": without(
        "choose.cu", "& (kDigits - 1)), mass);\n    }\n    __syncthreads();", "choose"
    ),
    "scores read before they are scaled": without(
        "choose.cu", "scores[v] = scaled(scores[v]);\n  __syncthreads();", "choose"
    ),
}


# Without these waits, what is copied is used before it has arrived.
EARLY = {
    "weights": Mistake("linear_tiles.cu", "copies.template wait<kStages - 1>();", "", "linear", dtype="bfloat16"),
    "rows": Mistake("linear_tiles.cu", "copies.template wait<0>();", "", "linear", dtype="bfloat16"),
}


def program(mistake: Mistake | None = None) -> Path:
    """drive.cpp, without a sanitizer."""
    return linked("drive", [*objects(PLAIN, mistake), compiled(SHIM / "fibers.cpp", PLAIN)], PLAIN)


def drive(order: str, *words: str, mistake: Mistake | None = None) -> dict[str, str]:
    """What drive.cpp prints: the digest of memory by case and dtype, and what was ``launched``."""
    done = subprocess.run([program(mistake), order, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *digests, launched = done.stdout.splitlines()
    assert digests
    return dict(line.rsplit(" ", 1) for line in digests) | {"launched": launched}


def test_nothing_is_reported():
    """Every kernel, in one of its dtypes."""
    assert not races("1", "float32", "attention", "choose", "decoding", "prefix", "rows")
    assert not races("1", "bfloat16", "linear")  # by tensor cores


@pytest.mark.exhaustive
@pytest.mark.parametrize("order", ["in-order", "2", "3"])
def test_nothing_is_reported_in_other_orders_and_dtypes(order):
    assert not races(order)


@pytest.mark.parametrize(
    "mistake",
    [
        *(pytest.param(mistake, id=name) for name, mistake in MISTAKES.items()),
        *(pytest.param(mistake, id=name, marks=pytest.mark.exhaustive) for name, mistake in MORE.items()),
    ],
)
def test_a_planted_race_is_reported(mistake):
    """The test of these tests."""
    assert "WARNING: ThreadSanitizer: data race" in races("1", mistake.dtype, mistake.case, mistake=mistake)


def test_memory_is_the_same_whatever_the_order():
    expected = drive("in-order")
    for seed in range(2):
        assert drive(str(seed)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "arrival counted before all have written",
        pytest.param("digits read while they are counted", marks=pytest.mark.exhaustive),
    ],
)
def test_memory_is_another_if_a_barrier_is_missing(name):
    """The test of the test above: some random order has another result."""
    mistake = (MISTAKES | MORE)[name]
    found = (drive(seed, mistake.case, mistake.dtype, mistake=mistake) for seed in ("in-order", *map(str, range(5))))
    right = drive("in-order", mistake.case, mistake.dtype)
    assert any(
        digests[f"{mistake.case} {mistake.dtype}"] != right[f"{mistake.case} {mistake.dtype}"] for digests in found
    )


@pytest.mark.parametrize("mistake", EARLY.values(), ids=EARLY)
def test_memory_is_another_if_nobody_waits_for_copies(mistake):
    name = f"{mistake.case} {mistake.dtype}"
    right, wrong = (drive("in-order", mistake.case, mistake.dtype, mistake=planted) for planted in (None, mistake))
    assert right[name] != wrong[name]


def test_every_kernel_is_driven():
    """Every instance of every kernel, so that no new one is forgotten."""
    launched = {int(offset) for offset in drive("in-order")["launched"].split()[1:]}
    names = [
        name
        for source in on_host.kernels()
        for name in re.findall(r"__global__ void (?:__launch_bounds__\(.*\) )?(\w+)\(", source.read_text())
    ]
    assert len(names) == sum(source.read_text().count("__global__") for source in on_host.kernels())
    symbols = subprocess.run(["nm", "--demangle", program()], capture_output=True, text=True, check=True).stdout
    defined = (line.split(" ", 2) for line in symbols.splitlines() if not line.startswith(" "))
    functions = {name: int(address, 16) for address, _, name in defined}
    kernel = re.compile(rf".*::({'|'.join(names)})(<.*>)?\([\w:]+\)")
    instances = {name: address - functions["main"] for name, address in functions.items() if kernel.fullmatch(name)}
    assert {kernel.fullmatch(name)[1] for name in instances} == set(names)
    assert not [name for name, offset in instances.items() if offset not in launched]


@pytest.mark.parametrize("batch", [3, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_an_engine_draws_the_same_whatever_the_order(batch):
    gpt = random_gpt()
    made, given = Place("cpu").engine(gpt, slots=batch), torch.randint(24, (batch, 20))
    expected = decoded(made, given, range(15, 20), seed=1, top_k=9, top_p=0.9)
    on_host.module().run_at_random(0)
    try:
        assert torch.equal(decoded(made, given, range(15, 20), seed=1, top_k=9, top_p=0.9), expected)
    finally:
        on_host.module().run_in_order()
