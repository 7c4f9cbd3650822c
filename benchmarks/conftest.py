"""Shared by all benchmarks: facts about the machine, its limits measured in the same run, and fair comparisons.

The recorded JSON contains the machine (``machine_info.tamingfast``) and how fast it reads memory and multiplies, so
that each time can be read as a share of what is physically possible.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import gpu
import pytest
from measuring import limits, seconds, synchronize

from tamingfast.ops import backends, info


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "a look at every file, in about a minute for all: only cases marked `quick`, in few rounds"
    parser.addoption("--quick", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick(**parameters): --quick runs the cases with these parameters")
    config.option.reportchars += "s"  # the reasons of skips


def pytest_report_header() -> list[str]:
    return info.describe().splitlines()


def is_quick(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("quick")
    return marker is not None and all(item.callspec.params[name] == value for name, value in marker.kwargs.items())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not is_quick(item)])
        items[:] = [item for item in items if is_quick(item)]
    device = backends.gpu()
    if not device.available:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=device.reason))


class Results:
    """Shows what each benchmark prints as soon as it is done."""

    def __init__(self, reporter: Any) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and report.capstdout:
            self.reporter.write_line(f"\n{report.nodeid}\n{report.capstdout.strip(chr(10))}")


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    plugins.register(Results(plugins.get_plugin("terminalreporter")))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if path := gpu.write():
        terminalreporter.section("GPU")
        for line in (*gpu.table(), f"written to {path}"):
            terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    devices = ["cpu", "cuda"] if backends.gpu().available else ["cpu"]
    machine_info.pop("node", None)  # the host's name says nothing about the results
    machine_info["tamingfast"] = backends.machine() | {"limits": {device: limits(device) for device in devices}}


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether a look is enough."""
    return request.config.getoption("--quick")


@pytest.fixture
def compare(benchmark, quick) -> Callable[..., None]:
    """Time ``ours`` and ``rivals`` in turn, so that other load on the machine affects all of them equally.

    ``compare(ours, rivals, device, flop, size)``: ``rivals`` maps names to callables, which the caller has run and
    validated; ``flop`` and ``size`` (bytes) are the operations and the memory traffic that the problem requires.
    ``extra_info`` receives the median seconds of each rival, the ratio of the fastest rival to ours, and our share of
    the limit: the larger of size / bandwidth and flop / rate, divided by our time.
    """

    def run(
        ours: Callable[[], Any],
        rivals: dict[str, Callable[[], Any]],
        device: str,
        flop: float,
        size: float,
        rounds: int = 5,
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def between_rounds() -> None:
            for name, rival in rivals.items():
                times[name].append(seconds(rival, device))
            limits(device)

        def timed() -> None:
            ours()
            synchronize(device)

        benchmark.pedantic(timed, setup=between_rounds, rounds=2 if quick else rounds)

        mine = benchmark.stats.stats.median
        medians = {name: statistics.median(measured) for name, measured in times.items()}
        limit = limits(device)
        best = max(size / limit["gb_per_s"], flop / limit["float32_gflop_per_s"]) / 1e9
        benchmark.extra_info |= {
            "rival_seconds": medians,
            "best_rival": min(medians, key=medians.get),
            "ratio_to_best_rival": min(medians.values()) / mine,
            "gflop_per_s": flop / mine / 1e9,
            "share_of_limit": best / mine,
        }
        print(
            f"\n  {mine * 1e3:.1f} ms, {benchmark.extra_info['ratio_to_best_rival']:.2f}x the best of "
            + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in medians.items())
            + f"; {flop / mine / 1e9:.0f} GFLOP/s, {100 * best / mine:.0f} % of the limit"
        )

    return run
