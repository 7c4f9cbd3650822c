"""Models shared by the tests of tasks, each trained once."""

from __future__ import annotations

from pathlib import Path

import conditioned
import pytest
import tiny
import torch
from commands import run
from conditioned import ADVERSARIAL, KINDS, SIZE, SMALL, TOKENS, folder_of


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conditioned.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def first_stage(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    where = [f"data.path={data / 'coord/images'}", "model.params.lossconfig.params.perceptual_weight=0"]
    assert run("train", "vqgan", "folder_vqgan", "--out", out, *SMALL, *ADVERSARIAL, *where, "training.steps=10") == 0
    return out


@pytest.fixture(scope="session", params=KINDS)
def trained(request, data, first_stage, tmp_path_factory):
    """(kind, run of its first stage, run of the prior), each trained for a few steps by the commands."""
    kind, out = request.param, tmp_path_factory.mktemp(request.param)
    recipe, settings, key = KINDS[kind]
    words = []
    if recipe is not None:
        where = [f"data.path={folder_of(data, kind)}", f"data.kind={kind}", "training.steps=10"]
        assert run("train", "vqgan", recipe, "--out", out / "cond", *SMALL, *settings, *where) == 0
        words = ["--cond-stage", out / "cond"]
    else:
        words = [f"data.path={folder_of(data, kind)}", f"data.size={SIZE}", *settings]
        words += ["data.name=folder"] if kind == "class" else ["data.name=conditions", f"data.kind={kind}"]
    words += [f"prior.condition={kind if kind in TOKENS else key}"]
    words += ["training.steps=3", "training.batch_size=4", "training.image_every=3"]
    assert run("train", "prior", "tiny", "--first-stage", first_stage, "--out", out / "prior", *words) == 0
    return kind, out / "cond", out / "prior"
