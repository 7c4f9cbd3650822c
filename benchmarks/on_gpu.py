"""Everything that only a GPU can show, in one command: `make gpu OUT=DIR BUDGET=500`.

Correctness first (engine, kernels, compute-sanitizer), then our figures beside the device's limits, then rivals. Each
part is a process of its own with a time limit, so that a part which crashes or hangs costs no other. A part that does
not fit into what is left of the budget is skipped and named; `--part NAME` runs just those named. In DIR, at most eight
files, each written as soon as there is something to write: `parts.json` (what ran, exit status, seconds), `log.txt`
(all output, each line behind the name of its part), `<device>.json` (the benchmarks' rows).

It needs no network: `--wheels FOLDER` installs what is missing from files there. Until that is done only Python's own
library and torch may be imported here. `--dry-run` goes through all parts on a machine without a GPU, where the tests
that need one skip.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("numpy", "omegaconf", "pytest", "pytest_benchmark", "safetensors", "shtab", "tqdm", "xdist", "yaml")
SECONDS_TO_END = 5.0  # between the request to end and the order to
NO_TESTS = 5  # pytest's exit status
PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-rfE", "--disable-warnings")


@dataclass(frozen=True)
class Part:
    """A command that shows one thing.

    Attributes:
        name: what `--part` calls it.
        arguments: of this Python.
        least: seconds without which it is not begun.
        most: seconds after which it is ended.
        alone: whether it times something, so that nothing may run beside it.
        environment: variables that it gets beside those of this process.
    """

    name: str
    arguments: tuple[str, ...]
    least: float
    most: float
    alone: bool = True
    environment: tuple[tuple[str, str], ...] = ()


def tests(name: str, *arguments: str, least: float, most: float, workers: int) -> Part:
    """Tests marked ``gpu``; a worker that meets an error which the device cannot forget is replaced."""
    words = (*PYTEST, "-n", str(workers), "-p", "no:benchmark", "--dist", "worksteal", "--durations=8")
    # Tiles are chosen by time: while others run that says little, and the choices would be kept for the benchmarks.
    cache = str(Path(tempfile.gettempdir(), "tamingfast-gpu-tests"))
    apart = (("TAMINGFAST_TUNE", "0"), ("TRITON_CACHE_DIR", cache))
    return Part(name, (*words, *arguments), least, most, alone=False, environment=apart)


def bench(name: str, file: str, selected: str = "", *, least: float, most: float) -> Part:
    """Benchmarks marked ``gpu``."""
    return Part(name, (*PYTEST, f"benchmarks/{file}", *(("-k", selected) if selected else ())), least, most)


#: In order of worth. Neighbours that need not be alone run side by side, but nothing beside the first.
PARTS = (
    replace(tests("smoke", "tests/ops", "tests/sampling", least=15, most=60, workers=4), alone=True),
    tests("engine", "tests/engines", "-k", "not sanitizer", least=30, most=200, workers=5),
    tests("kernels", "tests/kernels", least=30, most=200, workers=8),
    tests("sanitizer", "tests/engines/test_cuda_device.py", "-k", "sanitizer", least=30, most=120, workers=3),
    bench("decode", "test_decode_gpu.py", "ours", least=20, most=120),
    bench("profile", "test_decode_gpu.py", "profile", least=15, most=60),
    bench("layers", "test_linear_layers.py", least=15, most=60),
    bench("attention", "test_attention.py", "causal", least=20, most=120),
    bench("codes", "test_nearest_code.py", least=20, most=90),
    bench("norm", "test_group_norm.py", "contiguous", least=20, most=90),
    bench("decode-rivals", "test_decode_gpu.py", "rivals", least=60, most=240),
    bench("pictures", "test_first_stage_gpu.py", least=15, most=60),
    bench("pixels", "test_decode_gpu.py", "pixels", least=40, most=180),
    bench("training", "test_training_step.py", least=40, most=150),
    bench("prefixes", "test_attention.py", "prefix", least=60, most=180),
    bench("window", "test_sliding_window.py", least=30, most=120),
)


class Report:
    """What ran so far, and everything that it printed."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.done = out / "parts.json", {}
        if self.path.exists():
            self.done = json.loads(self.path.read_text(encoding="utf-8"))
        self._log = open(out / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  open as long as this is
        self._lock = threading.Lock()

    def say(self, name: str, line: str) -> None:
        """Adds a line to the log and to the output."""
        with self._lock:
            for file in (self._log, sys.stdout):
                print(f"[{name}] {line}", file=file, flush=True)

    def add(self, name: str, **facts: object) -> None:
        """Keeps what became of a part."""
        with self._lock:
            self.done[name] = facts
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.done, indent=1), encoding="utf-8")
            partial.replace(self.path)


class Running:
    """A part's process, whose output goes to the report."""

    def __init__(self, part: Part, report: Report, limit: float) -> None:
        self.part, self.report, self.begun = part, report, time.monotonic()
        self.until = self.begun + limit
        self.process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            env=os.environ | dict(part.environment),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.report.say(self.part.name, line.rstrip())

    def wait(self) -> int:
        """Ends the process at its limit; returns its exit status, negative if a signal ended it."""
        for order in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, self.until - time.monotonic()))
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, order)
            self.until = time.monotonic() + SECONDS_TO_END
        status = self.process.wait()
        self._reader.join(SECONDS_TO_END)
        seconds = round(time.monotonic() - self.begun, 1)
        self.report.add(self.part.name, status=status, seconds=seconds)
        self.report.say(self.part.name, f"ended with status {status} after {seconds} s")
        return status


def side_by_side(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts in order; neighbours that need not be alone together."""
    group: list[Part] = []
    for part in parts:
        if part.alone and group:
            yield group
            group = []
        group.append(part)
        if part.alone:
            yield group
            group = []
    if group:
        yield group


def run(parts: Sequence[Part], report: Report, deadline: float) -> bool:
    """Runs the parts until the deadline; returns whether all that ran succeeded and none was skipped."""
    good = True
    for group in side_by_side(parts):
        left = deadline - time.monotonic() - SECONDS_TO_END
        fits = [part for part in group if part.least <= left]
        for part in group:
            if part not in fits:
                report.add(part.name, status=None, seconds=0)
                report.say(part.name, f"skipped: needs {part.least:.0f} s, and {max(left, 0):.0f} s are left")
                good = False
        running = [Running(part, report, min(part.most, left)) for part in fits]
        good = all([one.wait() in (0, NO_TESTS) for one in running]) and good
    return good


def missing() -> list[str]:
    """Packages that cannot be found."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def has_extension() -> bool:
    """Whether the extension beside the package belongs to this Python and has the CUDA engine."""
    probe = "import sys; from tamingfast.ops import backends; sys.exit(not backends.native()[0].cuda)"
    return subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True).returncode == 0


def import_from(folder: Path) -> None:
    """Lets processes that are started from now on import from the folder before any other."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def prepare(wheels: Path | None, report: Report, deadline: float) -> None:
    """Installs the wheels, makes the clone importable, and builds the extension if it is missing."""
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    if wheels is not None:
        folder = ROOT / "build" / "gpu-site"
        files = tuple(map(str, sorted(wheels.glob("*.whl"))))
        run((Part("wheels", (*pip, "--upgrade", "--target", str(folder), *files), 1, 120),), report, deadline)
        sys.path.insert(0, str(folder))
        import_from(folder)
    import_from(ROOT)
    link = ROOT / "tamingfast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..", "kernels"))
    if not has_extension():
        os.environ |= {"TAMINGFAST_CUDA": "1", "TAMINGFAST_REQUIRE_NATIVE": "1"}
        run((Part("build", ("setup.py", "build_ext", "--inplace"), 60, 240),), report, deadline)


def chosen(names: Sequence[str]) -> list[Part]:
    """The named parts in their order, or all. Raises SystemExit for an unknown name."""
    unknown = sorted(set(names) - {part.name for part in PARTS})
    if unknown:
        raise SystemExit(f"--part: got {unknown[0]!r}, expected one of {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if part.name in names or not names]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything ran and nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the results")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for everything")
    parser.add_argument("--part", nargs="*", default=[], metavar="NAME", help="run these, also if they ran before")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install the wheels in it first")
    parser.add_argument("--dry-run", action="store_true", help="go on without a GPU")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget
    parts = chosen(args.part)
    import torch

    if not torch.cuda.is_available() and not args.dry_run:
        raise SystemExit("no GPU: torch finds no CUDA device here; --dry-run goes through the parts without one")
    report = Report(args.out)
    os.environ |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["TAMINGFAST_RESULTS"] = str(args.out.resolve())
    prepare(args.wheels, report, deadline)
    if missing():
        raise SystemExit(f"packages: {', '.join(missing())} are missing; name a folder with their wheels by --wheels")
    if not args.part:
        parts = [part for part in parts if report.done.get(part.name, {}).get("status") not in (0, NO_TESTS)]
    return 0 if run(parts, report, deadline) else 1


if __name__ == "__main__":
    raise SystemExit(main())
