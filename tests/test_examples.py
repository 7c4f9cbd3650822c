"""The scripts in examples/ run, and do what they say."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import golden
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import images, load_model, tasks

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_gradients_through_the_decoder_move_an_image_to_its_target(tmp_path):
    """A script of the kind that pairs a VQGAN with CLIP, written for the original's names, unchanged on our classes."""
    model = load_model(golden.checkpoint("vqmodel_f2"))
    tokens = torch.randint(0, model.n_embed, (1, 8, 8), generator=torch.Generator().manual_seed(3))
    images.save_png(
        tmp_path / "picture.png", images.to_uint8(model.decode_grid(tokens))[0]
    )  # one that these weights can draw
    command = [sys.executable, "-m", "tamingfast.compat", EXAMPLES / "optimise_latents.py"]
    files = [golden.path("vqmodel_f2.yaml"), golden.checkpoint("vqmodel_f2"), "picture.png", "out.png"]
    done = subprocess.run(
        [*command, *files, "--tokens", "8", "--steps", "31", "--rate", "0.3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"step \d+: (\S+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0], losses
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (16, 16)


def test_a_model_without_its_loss_still_draws():
    model = load_model(golden.checkpoint("vqmodel_f2"))
    del model.loss
    tokens = model.encode_grid(model.decode_grid(model.quantize.embedding.weight.new_zeros(1, 4, 4).long()))
    assert tokens.shape == (1, 4, 4)


def script(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where annotations are looked up
    spec.loader.exec_module(module)
    return module


def main(name: str, *words: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    script(name).main()


def test_every_example_has_a_test_and_a_line_on_the_page():
    here = Path(__file__).read_text("utf-8")
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text("utf-8")
    for path in EXAMPLES.iterdir():
        if path.is_file():
            assert path.stem in here and f"examples/{path.name}" in page, path


def test_the_tour(tmp_path, monkeypatch):
    """Its cells run in order, with trainings of a second, and show their pictures."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("skimage")
    tour = nbformat.read(EXAMPLES / "tour.ipynb", 4)
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    (settings,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    settings.source, before = "SECONDS = 1", settings.source
    assert re.fullmatch(r"SECONDS = \d+", before)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    nbclient.NotebookClient(tour, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output["data"] for cell in cells for output in cell.outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == len(shown) >= 9
    said = "".join(output["text"] for cell in cells for output in cell.outputs if output.output_type == "stream")
    assert "the same: 1.0" in said and "lookahead 1: 1.00 tokens per pass" in said
    assert float(said.rpartition("lookahead 8: ")[2].split()[0]) > 1.5


def test_the_tour_is_small():
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 300_000


def test_kernels_in_a_model_of_somebody_else():
    example = script("kernels_in_your_model")
    torch.manual_seed(0)
    theirs = example.Theirs(codes=64)
    ours = example.exchange(theirs)
    kinds = [type(module).__name__ for module in ours.modules()]
    assert kinds.count("FusedNorm") == 2 and {"FusedQuantiser", "FusedAttention"} <= set(kinds)
    assert not {"SiLU", "Attention", "Quantiser", "GroupNorm"} & set(kinds)
    assert not any(type(module).__name__.startswith("Fused") for module in theirs.modules())
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    (tokens, expected), (found, got) = example.gradients(theirs, x), example.gradients(ours, x)
    assert torch.equal(tokens, found) and len(tokens.unique()) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_comparison_of_kernels(monkeypatch, capsys):
    main("kernels_in_your_model", "--size", 32, "--rounds", 1, monkeypatch=monkeypatch)
    assert re.search(r"tokens that are the same: 100.00%\n.* [1-9].\de-0[5-9] of", capsys.readouterr().out)


def test_training_on_a_folder(tmp_path, monkeypatch, capsys):
    for number, pixels in enumerate(tiny.photographs(12, 72)):
        images.save_png(tmp_path / "pictures" / ("odd" if number % 2 else "even") / f"{number}.png", pixels)
    small = ["model.params.ddconfig.ch_mult=[1,1,1]", "training.batch_size=4", "training.validation_batches=1"]
    for minutes in (0.02, 0.03):  # begins, and continues
        words = (tmp_path / "pictures", "--out", tmp_path / "runs", "--minutes", minutes, *small)
        main("train_on_a_folder", *words, monkeypatch=monkeypatch)
        assert "16 drawings; mean error of reconstructions: 0." in capsys.readouterr().out
    assert tasks.class_names_of(load_model(tmp_path / "runs" / "prior")) == ["even", "odd"]
    with Image.open(tmp_path / "runs" / "drawn.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 500
    with pytest.raises(SystemExit, match="^error: data.path=.*nowhere: got a path that does not exist"):
        main("train_on_a_folder", tmp_path / "nowhere", "--out", tmp_path / "other", monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of a service that draws four images of 32x32 at most, lets two wait and keeps two."""
    pytest.importorskip("uvicorn")
    testclient = pytest.importorskip("fastapi.testclient")
    example = script("drawing_service")
    limits = example.Limits(images=4, pixels=5000, waiting=2, kept=2)
    with testclient.TestClient(example.service("demo", limits)) as client:
        yield client


class TestDrawingService:
    @pytest.fixture
    def held(self, monkeypatch) -> Iterator[Callable[..., None]]:
        """Drawings wait until the test ends, or until they are told to stop."""
        draw, go_on = tasks.sample, threading.Event()

        def waiting(*args: Any, stop: Callable[[], bool], **options: Any) -> Any:
            while not (go_on.wait(0.01) or stop()):
                pass
            return draw(*args, stop=stop, **options)

        monkeypatch.setattr(tasks, "sample", waiting)
        yield go_on.set
        go_on.set()

    def ended(self, client: Any, id: str) -> dict[str, Any]:
        for _ in range(6000):
            found = client.get(f"/drawings/{id}").json()
            if found["state"] not in ("waiting", "drawing"):
                return found
            time.sleep(0.01)
        raise AssertionError(found)

    def test_a_drawing_is_that_of_the_task(self, client):
        asked = client.post("/drawings", json={"count": 2, "label": "ship", "seed": 5, "schedule": "paper"})
        assert asked.status_code == 202 and asked.json()["state"] in ("waiting", "drawing")
        assert self.ended(client, asked.json()["id"])["state"] == "done"
        picture = client.get(f"/drawings/{asked.json()['id']}/picture")
        assert picture.headers["content-type"] == "image/png"
        same = tasks.sample("demo", 2, label="ship", options=tasks.drawing_options("demo", seed=5))
        with Image.open(io.BytesIO(picture.content)) as image:
            assert image.tobytes() == images.grid(same.images).tobytes()
            assert '"seed": 5' in image.text["tamingfast"]

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"count": 5}, "count: got 5, expected at most 4"),
            ({"count": 0}, "count: got '0', expected otherwise: input should be greater than or equal to 1"),
            ({"count": "many"}, "count: got 'many', expected"),
            ({"width": 33}, "size: got 32x33 pixels, expected multiples of 4; try 32x32"),
            ({"width": 512}, "height, width: got 1 x 32 x 512 pixels, expected at most 5000 in all"),
            ({"label": "shipp"}, "label: got class 'shipp', expected 0 to 9, or one of airplane"),
            ({"temperature": -1}, "temperature: got -1.0, expected"),
            ({"schedule": "fast"}, "schedule: got 'fast', expected"),
            ({"sed": 1}, "sed: got '1', expected"),
        ],
    )
    def test_mistakes_are_answered_with_a_sentence(self, client, body, said):
        answer = client.post("/drawings", json=body)
        assert answer.status_code == 422 and list(answer.json()) == ["error"]
        assert answer.json()["error"].startswith(said) and "\n" not in answer.json()["error"]

    def test_the_queue_is_bounded_and_its_jobs_can_be_stopped(self, client, held):
        jobs = []
        for _ in range(3):
            jobs.append(client.post("/drawings", json={}).json()["id"])
            while len(jobs) == 1 and client.get(f"/drawings/{jobs[0]}").json()["state"] != "drawing":
                time.sleep(0.01)
        assert [client.get(f"/drawings/{id}").json().get("before") for id in jobs] == [None, 1, 2]
        refused = client.post("/drawings", json={})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        early = client.get(f"/drawings/{jobs[1]}/picture")
        assert early.status_code == 409 and "a drawing that is waiting" in early.json()["error"]
        for id in jobs[:2]:
            assert client.delete(f"/drawings/{id}").status_code == 204
        held()
        assert self.ended(client, jobs[2])["state"] == "done"
        gone = client.get(f"/drawings/{jobs[0]}")
        assert gone.status_code == 404 and gone.json()["error"].startswith("id: got")

    def test_old_pictures_are_forgotten(self, client):
        jobs = [client.post("/drawings", json={}).json()["id"] for _ in range(1)]
        for _ in range(3):
            self.ended(client, jobs[-1])
            jobs.append(client.post("/drawings", json={}).json()["id"])
        self.ended(client, jobs[-1])
        assert [client.get(f"/drawings/{id}").status_code for id in jobs] == [404, 404, 200, 200]

    def test_a_drawing_that_fails_does_not_end_the_worker(self, client, monkeypatch):
        def broken(*args: Any, **options: Any) -> None:
            raise RuntimeError("a secret")

        with monkeypatch.context() as patch:
            patch.setattr(tasks, "sample", broken)
            failed = self.ended(client, client.post("/drawings", json={}).json()["id"])
        assert failed["state"] == "failed" and "secret" not in failed["error"]
        assert client.get(f"/drawings/{failed['id']}/picture").status_code == 409
        assert self.ended(client, client.post("/drawings", json={}).json()["id"])["state"] == "done"
