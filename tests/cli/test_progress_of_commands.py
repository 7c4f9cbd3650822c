"""Progress on everything over a second: each phase of each command reports, seen with a clock that jumps."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import tiny
from commands import run
from PIL import Image

from tamingfast import cli, progress
from tamingfast.cli.progress import bars_of

DRAWN = {"checksum", "tokens", "multiply-adds of decoding"}
CODED = {"checksum", "multiply-adds of encoding", "multiply-adds of decoding"}
#: command line -> what must report
COMMANDS = {
    "sample PRIOR -n 2 --out o.png": DRAWN,
    "sample PRIOR -n 1 --size 16 --out o.png": {*DRAWN, "tokens in sliding windows"} - {"tokens"},
    "sample PRIOR -n 2 --npz o.npz": {"checksum", "tokens", "images"},
    "edit PRIOR photo.png --mask mask.png --out o.png": {*CODED, "tokens in sliding windows"},
    "outpaint PRIOR photo.png --right 2 --out o.png": {*CODED, "tokens in sliding windows"},
    "reconstruct VQGAN photo.png --out o.png": CODED,
    "complete PRIOR photo.png --size 8 --times 1 --out o.png": {*CODED, "tokens"},
    "likelihood PRIOR photo.png --strides 4": {"checksum", "multiply-adds of encoding", "tokens"},
    "encode VQGAN --out t.safetensors": {"checksum", "images"},
    "encode VQGAN --out t --shard 4 --views 2": {"checksum", "images"},
    "evaluate PRIOR --samples 2 --limit 2": {"checksum", "images"},
    "inspect PRIOR": {"checksum"},
    "inspect PRIOR/state.pt": {"reading weights"},
    "convert VQGAN/state.pt c.safetensors --config VQGAN/config.yaml": {"reading weights", "checksum"},
    "convert VQGAN converted --layout diffusers": {"checksum"},
    "export VQGAN --out exported": {"checksum", "networks"},
    "train vqgan tiny.yaml --out run": {"run"},
    "train prior prior.yaml --first-stage VQGAN --out run": {"checksum", "run"},
}
#: These run the others (reproduce), fetch one file (download), send files (push), show progress elsewhere (ui), or do
#: nothing long.
ELSEWHERE = {"reproduce", "download", "push", "ui", "info", "completion"}


@pytest.fixture
def jumping(monkeypatch):
    """A clock of progress alone that jumps by more than a minute whenever it is looked at."""
    now = iter(range(0, 10**9, 61))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    monkeypatch.setattr(progress.Lines, "last", 0.0)


@pytest.mark.parametrize(("line", "phases"), COMMANDS.items())
def test_each_phase_reports(line, phases, runs, jumping, tmp_path, monkeypatch, capsys):
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)
    for name, mode in (("photo.png", "RGB"), ("mask.png", "L")):
        Image.fromarray(tiny.photographs(1, 16)[0] | 255 * (mode == "L")).convert(mode).save(name)
    OmegaConf.save(OmegaConf.create(tiny.config(tiny.VQGAN, steps=2) | {"data": tiny.CROPS}), "tiny.yaml")
    unconditional = {"data": tiny.CROPS, "prior": {"condition": "none"}}
    OmegaConf.save(OmegaConf.create(tiny.config(tiny.PRIOR, steps=2) | unconditional), "prior.yaml")
    for name in ("PRIOR", "VQGAN"):
        line = line.replace(name, str(runs / name.lower()))
    assert run(*line.split()) == 0
    lines = capsys.readouterr().err.splitlines()
    reported = {found[1] for found in (re.match(r"(.+?): [\d.]+", each) for each in lines) if found}
    assert reported >= phases


def test_every_command_is_listed():
    (commands,) = (action for action in cli.parser()._actions if hasattr(action, "choices") and action.choices)
    assert {line.split()[0] for line in COMMANDS} | ELSEWHERE == set(commands.choices)


def advice(*words: str, unit: str, caplog) -> str:
    """What the bars of a command say of work that has taken ten minutes for a hundredth of it."""
    arguments = cli.parser().parse_args(words)
    caplog.clear()
    for _ in range(2):  # once, however often the work is done
        with bars_of(arguments)(unit, None) as counter:
            counter.moved(1, 100)
            counter.moved(2, 100)
    return caplog.text


@pytest.mark.parametrize(
    ("words", "unit", "said"),
    [
        (
            "outpaint p photo.png",
            "multiply-adds of encoding",
            "encoding: about .* left at this pace; a smaller picture",
        ),
        ("reconstruct p photo.png", "multiply-adds of encoding", "a smaller --size, or a model .* larger factor f"),
        ("sample p", "tokens in sliding windows", "--schedule strided --stride 4 takes a fraction of it"),
        ("sample p --schedule block", "tokens in sliding windows", "a smaller --size takes less"),
        ("sample p --resume", "tokens in sliding windows", "a smaller --size takes less"),
        ("evaluate p", "images", "a smaller --limit"),
    ],
)
def test_long_work_is_estimated_with_advice(words, unit, said, jumping, caplog):
    assert re.search(said, advice(*words.split(), unit=unit, caplog=caplog))


def test_an_estimate_is_made_once_and_only_of_long_work(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    told: set[str] = set()
    for name, pace, said in (("quick", 0.5, 0), ("slow", 3.0, 1), ("slow", 3.0, 1)):
        with progress.bar(name, None) as bar:
            counter = progress.Estimated(bar, name, "; do less", told)
            for done in range(1, 30):
                now[0] += pace
                counter.moved(done, 100)
        assert caplog.text.count("left at this pace; do less") == said
    assert "slow: about 5 minutes left" in caplog.text
    caplog.clear()
    with progress.bar("begun", None) as bar:
        counter = progress.Estimated(bar, "begun", "", told)
        for done, passed in enumerate((30.0, *[0.5] * 29), 1):  # half a minute of preparation, then a quick pace
            now[0] += passed
            counter.moved(done, 100)
    assert not caplog.text
    assert [progress.duration(each) for each in (61, 180, 7200, 3 * 86400)] == [
        "61 seconds", "3 minutes", "2 hours", "3 days",
    ]  # fmt: skip
