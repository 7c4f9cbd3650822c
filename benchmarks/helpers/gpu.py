"""Timing on a GPU: device events, rotated inputs that miss the L2 cache, ceilings from the same run, and results."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tamingfast import files
from tamingfast.ops import backends

#: Where the rows are written.
RESULTS = Path(os.environ.get("TAMINGFAST_RESULTS") or Path(__file__).parents[1] / "results" / "gpu")
# The number of runs is limited because the launch queue holds about a thousand entries, and a call may take a dozen.
_WARM_UP_MS, _MEASURE_MS, _LEAST_RUNS, _MOST_RUNS = 20.0, 80.0, 8, 60
_CYCLES_PER_SECOND, _LONGEST_WAIT = 2e9, 0.25
_MOST_COPIES = 32

rows: list[dict[str, Any]] = []


def copies_past_cache(size: int) -> int:
    """Number of input sets of ``size`` bytes needed for each to have left the L2 cache before its next turn."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(_MOST_COPIES, 1 + 3 * cache // max(size, 1)))


def milliseconds(run: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Median device time of ``run(input)`` over the inputs in turn, after compilation and tuning."""
    turns = itertools.cycle(inputs)
    for _ in range(3):
        run(next(turns))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(next(turns))
    host = time.perf_counter() - begin  # time to launch, without waiting for the device
    once = _elapsed(run, [next(turns)], host)[0]
    for _ in range(max(1, min(_MOST_RUNS, int(_WARM_UP_MS / max(once, 1e-3))))):
        run(next(turns))
    count = max(_LEAST_RUNS, min(_MOST_RUNS, int(_MEASURE_MS / max(once, 1e-3))))
    return statistics.median(_elapsed(run, [next(turns) for _ in range(count)], host))


def host_milliseconds(run: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Median time in which the host launches ``run(input)``, to an idle device and without waiting for it."""
    turns, times = itertools.cycle(inputs), []
    for _ in range(3 * _LEAST_RUNS):
        value = next(turns)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(value)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def _elapsed(run: Callable[[Any], Any], inputs: Sequence[Any], host: float) -> list[float]:
    """Milliseconds of each call; the host needs ``host`` seconds to launch one."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in inputs]
    torch.cuda.synchronize()
    # The device sleeps until the host is ahead. Otherwise the time of a small call would be that of its launches.
    torch.cuda._sleep(int(_CYCLES_PER_SECOND * min(_LONGEST_WAIT, 1e-3 + 1.5 * host * len(inputs))))
    for (start, stop), value in zip(events, inputs, strict=True):
        start.record()
        run(value)
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


_ceilings: dict[str, float] = {}


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read plus written) and matrix-product rates of this device, measured once per run."""
    if not _ceilings:
        source = torch.randn(2**28, device="cuda")
        target = torch.empty_like(source)
        copy = milliseconds(lambda _: target.copy_(source), [None])
        _ceilings["copy_gb_per_s"] = 2 * 4 * source.numel() / copy / 1e6
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            side = 8192
            a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
            _ceilings[f"{name}_tflop_per_s"] = 2 * side**3 / milliseconds(lambda _, a=a, b=b: a @ b, [None]) / 1e9
    return _ceilings


def record(
    benchmark: str,
    case: str,
    times: dict[str, float],
    rivals: Sequence[str],
    *,
    flop: float = 0.0,
    size: float = 0.0,
    rate: str = "bfloat16",
    target: float | None = None,
    host: dict[str, float] | None = None,
) -> None:
    """Record one row: ``times["ours"]`` and the others in ms, and our share of the ceiling that limits the problem.

    ``flop`` and ``size`` (bytes) are the operations and the memory traffic that the problem requires; ``target`` is the
    speed-up over the fastest of ``rivals`` that we aim for. ``host`` has the times that the host needs for the calls:
    where one is longer than the device's, the device waits.
    """
    ours, limits = times["ours"], ceilings()
    floor = max(flop / limits[f"{rate}_tflop_per_s"] / 1e9, size / limits["copy_gb_per_s"] / 1e6)
    present = {name: times[name] for name in rivals if name in times}
    best = min(present, key=present.get) if present else None
    row = {
        "benchmark": benchmark, "case": case, "milliseconds": times,
        "host_milliseconds": host or {}, "best_rival": best,
        "ratio_to_best_rival": present[best] / ours if best else None, "target_ratio": target,
        "tflop_per_s": flop / ours / 1e9, "gb_per_s": size / ours / 1e6, "share_of_ceiling": floor / ours,
    }  # fmt: skip
    rows[:] = [old for old in rows if (old["benchmark"], old["case"]) != (benchmark, case)] + [row]
    write()  # after each row, so that an interrupted run keeps its results


def compare(
    benchmark: str, case: str, ours: Callable[[], float], rivals: Mapping[str, Callable[[], float]], **work: Any
) -> dict[str, float]:
    """Measures ours and records it, then each rival in turn; returns the milliseconds.

    A rival that fails is left out, with the reason. ``work`` is that of `record`.
    """
    times = {"ours": ours()}
    record(benchmark, case, times, list(rivals), **work)
    for name, rival in rivals.items():
        try:
            times[name] = rival()
        except Exception as error:  # whatever another package raises
            print(f"\n  {name} is left out: {type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}")
            continue
        record(benchmark, case, times, list(rivals), **work)
    return times


def table() -> list[str]:
    """The rows of this run as lines of text."""
    lines = [
        f"{'benchmark':<18} {'case':<44} {'ours ms':>9} {'host ms':>8} {'rival ms':>9} {'ratio':>6} {'aim':>5} "
        f"{'ceiling':>8}  rival"
    ]
    for row in rows:
        best = row["best_rival"]
        rival, ratio = (f"{row['milliseconds'][best]:.3f}", f"{row['ratio_to_best_rival']:.2f}") if best else ("-", "-")
        host = row["host_milliseconds"].get("ours")
        aim = f"{row['target_ratio']:.1f}" if row["target_ratio"] else ""
        lines.append(
            f"{row['benchmark']:<18} {row['case']:<44} {row['milliseconds']['ours']:>9.3f} "
            f"{'' if host is None else f'{host:.3f}':>8} {rival:>9} {ratio:>6} "
            f"{aim:>5} {100 * row['share_of_ceiling']:>6.0f} %  {best or ''}"
        )
    return lines


def write() -> Path | None:
    """Write the rows to benchmarks/results/gpu/<device>.json and return its path; None if there are no rows.

    Earlier rows of other cases are kept if machine and software are the same.
    """
    if not rows:
        return None
    import triton

    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    facts = backends.machine() | {"triton": triton.__version__, "cuda": torch.version.cuda}
    path = RESULTS / f"{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mine = {(row["benchmark"], row["case"]) for row in rows}
    kept = [row for row in before.get("rows", []) if (row["benchmark"], row["case"]) not in mine]
    kept = kept if before.get("machine") == facts else []
    files.write_json(path, {"machine": facts, "ceilings": ceilings(), "rows": kept + rows})
    return path
