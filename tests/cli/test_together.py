"""Commands in two processes of torchrun write the files of one process, and speak with one voice."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from forked import Forked, on_ranks, ranks
from PIL import Image
from shared_selection import selection

from tamingfast.sampling.canvas import Canvas

CROPS = [f"{name}={value}" for name, value in (tiny.CROPS | {"length": 14}).items()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, pixels in enumerate(tiny.photographs(5, 16)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def words_of(command: str, runs: Path, pictures: Path, out: Path) -> list[object]:
    """A command with several batches, the last of them smaller, which writes into ``out``."""
    return {
        "sample": ["sample", runs / "prior", "-n", 5, "--batch", 2, "--separate", "--seed", 3,
                   "--out", out / "drawn.png", "--canvas", out / "drawn.canvas"],
        "encode": ["encode", runs / "vqgan", "--batch", 4, "--out", out / "tokens.safetensors", *CROPS],
        "sample --npz": ["sample", runs / "prior", "-n", 5, "--batch", 2, "--npz", out / "drawn.npz"],
        "evaluate": ["evaluate", runs / "prior_pixels", "--batch", 2, "--limit", 7, "--samples", 5,
                     "--out", out / "report.json", "--state", out / "state.safetensors",
                     "--save-reference", out / "real.npz", *CROPS],
        "likelihood": ["likelihood", runs / "prior", pictures, "--size", "16x16", "--batch", 2, "--strides", 2,
                       "--plot", out / "plot.png"],
    }[command]  # fmt: skip


def content(path: Path) -> object:
    """The bytes of a file; of a canvas, whose metadata have no order, what it holds."""
    if path.suffix != ".canvas":
        return path.read_bytes()
    canvas = Canvas.load(path)
    return canvas.tokens.tolist(), canvas.pending.tolist(), canvas.cond.tolist(), canvas.settings, canvas.model


@pytest.mark.parametrize("command", ["sample", "sample --npz", "encode", "evaluate", "likelihood"])
def test_two_processes_write_what_one_does(runs, pictures, tmp_path, command):
    files, said = [], []
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        words = [*words_of(command, runs, pictures, out), "--device", "cpu"]
        processes = ranks(count, *words)
        outcomes = [process.outcome() for process in processes]
        assert [each.code for each in outcomes] == [0] * count, outcomes
        files.append({path.name: content(path) for path in out.iterdir() if not path.name.endswith(".lock")})
        said.append(processes[0].output().replace(str(out), ""))
        for process, outcome in list(zip(processes, outcomes, strict=True))[1:]:
            assert process.output() == outcome.error == ""
    assert files[0] and files[1] == files[0]
    assert said[0] and said[1] == said[0]


def test_a_drawing_that_one_process_began_is_finished_by_two(runs, tmp_path):
    canvas, words = tmp_path / "one.canvas", ["sample", runs / "prior", "--device", "cpu"]
    words += ["--out", tmp_path / "out.png", "--canvas", canvas, "--batch", 1]
    assert Forked(*words, "-n", 5, "--seed", 3).outcome().code == 0
    whole = Canvas.load(canvas)
    left = whole.pending.clone()
    left[1], left[3:] = True, True  # as if it had been interrupted, and its second image redrawn
    replace(whole, tokens=whole.tokens.masked_fill(left, 0), pending=left).save(canvas)
    assert [each.outcome().code for each in ranks(2, *words, "--resume")] == [0, 0]
    finished = Canvas.load(canvas)
    assert finished.done and torch.equal(finished.tokens, whole.tokens)


def test_candidates_of_a_sampling_with_rejection_are_shared():
    (tokens, pixels), *others = selection(), *on_ranks(2, selection)
    for drawn, decoded in others:
        assert torch.equal(drawn, tokens)
        torch.testing.assert_close(decoded, pixels, rtol=0, atol=1e-4)  # the number of threads is another


def said_by(processes: list[Forked]) -> list[str]:
    """The errors that all processes have named together; each must end with exit code 2."""
    outcomes = [process.outcome() for process in processes]
    assert [each.code for each in outcomes] == [2] * len(outcomes), outcomes
    assert not any("Traceback" in each.error for each in outcomes)
    return [line for each in outcomes for line in each.error.splitlines() if "error:" in line]


@pytest.mark.parametrize("words", [["sample", "nowhere"], ["sample", "nowhere", "--size", "7"], ["train", "vqgan"]])
def test_a_mistake_is_named_once(tmp_path, words):
    lines = said_by(ranks(2, *words, "--out", tmp_path / "out.png"))
    assert len(lines) == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_one_process_that_fails_ends_all_with_its_sentence(runs, tmp_path, failing):
    # The first process alone writes, so it alone notices that files may not be larger than a sentence.
    out = tmp_path / "tokens.safetensors"
    out.write_bytes(b"kept")
    words = ["encode", runs / "vqgan", "--out", out, "--device", "cpu", *CROPS]
    if failing == 0:
        lines = said_by(ranks(2, *words, largest=400))
        assert len(lines) == 1 and str(out) in lines[0]
    else:
        both = ranks(2, *words, "length=1000000", silence=3.0)
        both[0].wait_until(lambda: any(".partial" in path.name for path in tmp_path.iterdir()))
        both[1].kill(signal.SIGKILL)
        code, error = both[0].outcome()
        assert code == 2 and error.count("RANK: got no answer from another of the 2 processes") == 1, error
    assert out.read_bytes() == b"kept"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
