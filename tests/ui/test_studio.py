"""What the page's buttons do, without a browser."""

from __future__ import annotations

import dataclasses
import threading
import zipfile
from pathlib import Path

import golden
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from tamingfast import tasks
from tamingfast.data import conditions as kinds
from tamingfast.errors import UserError
from tamingfast.sampling import Canvas
from tamingfast.ui import conditions, desks, painting
from tamingfast.ui import studio as tab
from tamingfast.ui.choices import Choices, Wanted
from tamingfast.ui.jobs import Job

ONE = Wanted(1, 8, 8, [], None, 0)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(tiny.photographs(1, 16)[0]).save(path)
    return str(path)


def last(steps):
    return list(steps)[-1]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --- Sample ---------------------------------------------------------------------------------------------------------


def test_sampling_gives_pictures_with_recipes_and_the_canvas(studio, desk):
    shown = last(tab.sample(studio, desk, dataclasses.replace(ONE, count=3), Choices("7")))
    picture, archive, canvas = shown.files
    assert shown.note.startswith("3 images of 8x8 pixels in ")
    expected = tasks.sample(studio.model, 3, size=(8, 8), options=tasks.DrawingOptions(seed=7))
    assert torch.equal(Canvas.load(canvas).tokens, expected.canvas.tokens)
    assert tasks.recipe_of(picture) == expected.recipe
    with zipfile.ZipFile(archive) as inside:
        assert len(inside.namelist()) == 3
    assert desk.drawing is not None and shown.picture == picture


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 0}, "^count: got 0, expected 1 to 64"),
        ({"count": 1000}, "^count: got 1000"),
        ({"height": 9}, "^size: got 9x8 pixels, expected multiples of 2"),
        ({"height": 0}, "^size: got 0x8"),
        ({"width": None}, "^width: got None, expected a whole number"),
        ({"labels": ["cat"]}, "^label: got"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_work_begins(studio, desk, changed, message):
    with pytest.raises(UserError, match=message):
        list(tab.sample(studio, desk, dataclasses.replace(ONE, **changed), Choices()))
    assert desk.drawing is None


def test_a_drawing_that_is_too_large_for_the_memory_is_refused(studio, desk, monkeypatch):
    monkeypatch.setattr("tamingfast.tasks.drawing.available_memory", lambda device: 100)
    with pytest.raises(UserError, match=r"^memory: got 0\.0 GiB free"):
        list(tab.sample(studio, desk, ONE, Choices()))


def test_previews_show_what_is_there_and_a_stop_ends_it(studio, desk, monkeypatch):
    monkeypatch.setattr(tab, "EVERY", 0.0)
    seen = []
    for step in tab.sample(studio, desk, dataclasses.replace(ONE, height=64, width=64), Choices()):
        seen.append(step)
        desk.stopping.set()
    assert seen[0].note == "Drawing ..." and not seen[0].files and pixels(seen[0].picture).shape == (64, 64, 3)
    assert seen[-1].note.startswith("Stopped after ")
    assert not Canvas.load(seen[-1].files[-1]).done
    finished = last(tab.sample(studio, desk, ONE, Choices()))  # the stop was for the drawing before
    assert finished.note.startswith("1 image ")


def test_a_picture_fills_the_fields_and_is_repeated(studio, desk, tmp_path):
    options = tasks.DrawingOptions(seed=2**63 + 1, temperature=0.8, top_k=9)
    drawn = tasks.sample(studio.model, 3, size=(8, 12), options=options)
    files = drawn.save(tmp_path / "a.png", separate=True)
    wanted, choices, note = tab.opened_recipe(studio, desk, str(files[2]))
    assert (wanted.count, wanted.height, wanted.width) == (1, 8, 12) and choices == Choices.of(options)
    assert note.startswith("The fields are those of the picture")
    again = last(tab.sample(studio, desk, wanted, choices))
    assert (pixels(again.files[0]) == pixels(files[2])).all()
    other = last(tab.sample(studio, desk, wanted, dataclasses.replace(choices, seed="1")))
    assert (pixels(other.files[0]) != pixels(files[2])).any()


def test_pictures_of_others_fill_the_fields_alone(studio, demo, desk, tmp_path):
    drawn = tasks.sample(demo.model, 2, label="cat", options=tasks.DrawingOptions(seed=5))
    drawn.save(tmp_path / "cats.png")
    wanted, choices, note = tab.opened_recipe(studio, desk, str(tmp_path / "cats.png"))
    assert note == "Another model, demo, drew this: its settings are filled in."
    assert desk.recipe is None and choices.seed == "5" and wanted.labels == []
    wanted, _, note = tab.opened_recipe(demo, demo.desks.of("a"), str(tmp_path / "cats.png"))
    assert wanted.labels == ["cat"] and wanted.count == 2
    again = last(tab.sample(demo, demo.desks.of("a"), wanted, choices))
    assert (pixels(again.files[0]) == pixels(tmp_path / "cats.png")).all()


def test_pictures_without_a_recipe_of_sample(studio, desk, photo, tmp_path):
    with pytest.raises(UserError, match="got a picture without a recipe"):
        tab.opened_recipe(studio, desk, photo)
    tasks.edit(studio.model, photo, np.ones((16, 16), bool)).save(tmp_path / "edited.png")
    with pytest.raises(UserError, match=r"^edited\.png: got a picture of 'edit', expected one of 'sample'"):
        tab.opened_recipe(studio, desk, str(tmp_path / "edited.png"))


# --- Reconstruct and Inspect ----------------------------------------------------------------------------------------


def test_reconstruct(studio, desk, photo):
    found = tab.reconstruct(studio, desk, photo, 16)
    expected = tasks.reconstruct(studio.model, photo, size=(16, 16))
    assert f"16x16 pixels as 8x8 tokens, {expected.codes} different ones" in found.note
    assert f"PSNR {expected.psnr:.2f} dB" in found.note
    assert (pixels(found.image) == pixels(photo)).all() and pixels(found.tokens).shape == (8, 8, 3)
    apart = np.abs(pixels(found.image).astype(int) - pixels(found.reconstruction)).mean(-1)
    assert np.abs(np.minimum(4 * apart, 255) - pixels(found.difference)[..., 0]).max() <= 5
    with pytest.raises(UserError, match="^image: got none"):
        tab.reconstruct(studio, desk, None, 16)
    with pytest.raises(UserError, match="^side: got"):
        tab.reconstruct(studio, desk, photo, 0)


def test_inspect_shows_no_paths_of_this_machine(studio, runs, tmp_path):
    facts = tab.inspected(studio, None)
    assert facts["file"] == "prior" and str(runs) not in str(facts["file"])
    tasks.sample(studio.model, 1).save(tmp_path / "a.png")
    assert tab.inspected(studio, str(tmp_path / "a.png"))["recipe"]["task"] == "sample"
    (tmp_path / "bad.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError):
        tab.inspected(studio, str(tmp_path / "bad.ckpt"))


# --- Paint ----------------------------------------------------------------------------------------------------------


def layer(desk, size: int, part: slice, color=(255, 255, 255, 255)) -> str:
    strokes = np.zeros((size, size, 4), np.uint8)
    strokes[:, part] = color
    path = desk.file("layer.png")
    Image.fromarray(strokes).save(path)
    return str(path)


def test_painting_step_by_step(studio, desk, photo):
    before = painting.opened(studio, desk, photo, 16)
    assert pixels(before.editor).shape == (512, 512, 3) and before.shown.note.endswith("16x16 pixels.")
    strokes = layer(desk, 512, slice(0, 128))
    after = last(painting.redrawn(studio, desk, [strokes], None, None, Choices()))
    assert (pixels(after.shown.picture)[:, 8:] == pixels(photo)[:, 8:]).all()
    assert (pixels(after.shown.picture)[:, :4] != pixels(photo)[:, :4]).any()
    assert [path.suffix for path in after.shown.files] == [".png", ".canvas"]
    wider = last(painting.extended(studio, desk, (0, 4, 2, 0), None, None, Choices()))
    assert wider.shown.note.endswith("18x20 pixels.")
    assert (pixels(painting.undone(desk).shown.picture) == pixels(after.shown.picture)).all()
    assert (pixels(painting.undone(desk).shown.picture) == pixels(photo)).all()
    assert painting.undone(desk).shown.note.startswith("There is nothing to undo.")


def test_strokes_are_kept_as_paint(studio, desk):
    painting.blank(studio, desk, 16)
    red = layer(desk, 512, slice(0, 256), (255, 0, 0, 255))
    after = painting.painted(desk, [red])
    found = pixels(after.shown.picture)
    assert (found[:, :8] == (255, 0, 0)).all() and (found[:, 8:] == 128).all()
    assert [path.suffix for path in after.shown.files] == [".png"]  # nothing is encoded yet
    half = layer(desk, 512, slice(0, 512), (0, 0, 255, 128))
    mixed = pixels(painting.painted(desk, [red, half]).shown.picture)
    assert np.abs(mixed[0, 0].astype(int) - (127, 0, 128)).max() <= 1


def test_a_saved_canvas_and_a_drawing_are_painted_on(studio, desk):
    files = last(tab.sample(studio, desk, ONE, Choices())).files
    tokens = desk.drawing.canvas.tokens
    painting.opened(studio, desk, str(files[-1]), 999)
    assert torch.equal(desk.sheet.canvas.tokens, tokens)
    last(tab.sample(studio, desk, dataclasses.replace(ONE, count=3), Choices()))
    painting.taken(studio, desk, 2)
    assert torch.equal(desk.sheet.canvas.tokens[0], desk.drawing.canvas.tokens[1])
    with pytest.raises(UserError, match="^image: got 4, expected 1 to 3"):
        painting.taken(studio, desk, 4)


def test_what_cannot_be_painted(studio, desk, photo, tmp_path):
    for call in (
        lambda: painting.undone(desk),
        lambda: painting.opened(studio, desk, None, 16),
        lambda: painting.taken(studio, desk, 1),
        lambda: list(painting.redrawn(studio, desk, [], None, None, Choices())),
    ):
        with pytest.raises(UserError, match=r"^(photo|image): got none"):
            call()
    painting.opened(studio, desk, photo, 16)
    with pytest.raises(UserError, match="^mask: got a mask without a white pixel"):
        list(painting.redrawn(studio, desk, [], None, None, Choices()))
    with pytest.raises(UserError, match="^strokes: got 64x64 pixels, expected 512x512"):
        list(painting.redrawn(studio, desk, [layer(desk, 64, slice(9))], None, None, Choices()))
    with pytest.raises(UserError, match="^left: got 3 pixels, expected 0 or a multiple of 2"):
        list(painting.extended(studio, desk, (3, 0, 0, 0), None, None, Choices()))
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="cannot be read"):
        painting.opened(studio, desk, str(tmp_path / "eps.png"), 16)
    assert desk.sheet.size == (16, 16)  # what failed changed nothing


# --- Condition ------------------------------------------------------------------------------------------------------


def test_a_drawing_becomes_labels_and_edges(studio, desk):
    labels = (("sky", (10, 20, 200)), ("grass", (10, 200, 20)), ("road", (128, 128, 128)))
    form = tasks.Form("segmentation", (".png",), False, labels, 0)
    shown = np.array([color for _, color in labels])[[[0, 1], [2, 0]]] + 9
    assert conditions.nearest_labels(shown.astype(np.int32), form).tolist() == [[0, 1], [2, 0]]
    with_form = dataclasses.replace(studio.abilities, condition=form)
    studio.abilities = with_form
    sheet = conditions.sheet(studio, desk, 16, 24)
    assert pixels(sheet).shape == (16 * 21, 24 * 21, 3) and (pixels(sheet) == (10, 20, 200)).all()
    drawn = pixels(sheet).copy()
    drawn[: 8 * 21] = labels[2][1]
    Image.fromarray(drawn).save(sheet)
    given = conditions.from_brush(studio, str(sheet), (16, 24))["condition"]
    assert given.shape == (16, 24) and (given[:8] == 2).all() and (given[8:] == 0).all()
    with pytest.raises(UserError, match="^drawing: got 336x504 pixels, expected 512x512"):
        conditions.from_brush(studio, str(sheet), (16, 16))
    studio.abilities = dataclasses.replace(with_form, condition=tasks.Form("edges", (".png",), True, (), 0))
    sheet = conditions.sheet(studio, desk, 16, 16)
    drawn = pixels(sheet).copy()
    drawn[100:104] = 255  # a stroke that is thinner than a pixel of the condition
    Image.fromarray(drawn).save(sheet)
    given = conditions.from_brush(studio, str(sheet), (16, 16))["condition"]
    assert (given[3] == 255).all() and (np.delete(given, 3, 0) == 0).all()


def test_images_are_drawn_from_a_drawn_label_map(tmp_path, studio):
    own = tab.Studio(tasks.Unread(golden.checkpoint("net2net_seg"), "cpu"), studio.desks.folder)
    desk = own.desks.of("somebody")
    assert own.abilities.condition.name == "segmentation" and len(own.abilities.condition.labels) == 5
    sheet = conditions.sheet(own, desk, 32, 32)
    drawn = pixels(sheet).copy()
    drawn[:256] = own.abilities.condition.labels[3][1]
    Image.fromarray(drawn).save(sheet)
    given = conditions.from_brush(own, str(sheet), (32, 32))
    shown = last(conditions.sample(own, desk, given, 2, Choices("4")))
    labels = np.zeros((32, 32), np.uint8)
    labels[:16] = 3
    expected = tasks.sample(own.model, 2, condition=labels, options=tasks.DrawingOptions(seed=4))
    assert torch.equal(Canvas.load(shown.files[-1]).tokens, expected.canvas.tokens)
    labels.tofile(tmp_path / "labels.png")
    with pytest.raises(UserError, match=r"labels\.png: got"):
        list(conditions.sample(own, desk, conditions.from_file(str(tmp_path / "labels.png")), 1, Choices()))


def test_two_clicks_make_a_box(studio, desk):
    labels = (("cat", (9, 9, 9)), ("dog", (99, 99, 99)))
    studio.abilities = dataclasses.replace(
        studio.abilities, condition=tasks.Form("boxes", (".json",), False, labels, 2)
    )
    size = (32, 64)  # magnified eight times
    assert conditions.cornered(studio, desk, "dog", (256, 128), size)[1] == "Click the opposite corner."
    path, note = conditions.cornered(studio, desk, "dog", (128, 0), size)
    assert note.startswith("1 box. ") and pixels(path).shape == (256, 512, 3)
    kind = kinds.make("boxes", {"classes": ["cat", "dog"], "tokens": 64})
    scene = kind.read(conditions.from_boxes(desk, size)["condition"])
    assert scene.shape == (32, 64) and [(one.label, one.box) for one in scene.things] == [(1, (0.25, 0.0, 0.25, 0.5))]
    conditions.cornered(studio, desk, "cat", (5, 5), size)
    conditions.cornered(studio, desk, "cat", (9999, -5), size)  # outside: at the border
    assert desk.boxes[1] == ("cat", 5 / 512, 0.0, 1.0, 5 / 256)
    with pytest.raises(UserError, match="^boxes: got one more than 2"):
        conditions.cornered(studio, desk, "cat", (5, 5), size)
    conditions.fewer(studio, desk, size)
    assert len(desk.boxes) == 1
    with pytest.raises(UserError, match="^condition: got one, expected none"):  # of a model without conditions
        list(conditions.sample(studio, desk, conditions.from_boxes(desk, size), 1, Choices()))


def test_the_ways_to_give_a_condition():
    def ways(name, suffixes, computable):
        return conditions.ways(tasks.Form(name, suffixes, computable, (), 0))

    assert ways("segmentation", (".png",), False) == [conditions.DRAWN, conditions.FILE]
    assert ways("edges", (".png",), True) == [conditions.DRAWN, conditions.FILE, conditions.PHOTO]
    assert ways("depth", (".png", ".npy"), False) == [conditions.FILE]
    assert ways("coord", (), False) == []


# --- jobs and desks -------------------------------------------------------------------------------------------------


def test_a_job_that_nobody_watches_any_more_is_stopped():
    stopping, begun = threading.Event(), threading.Event()

    def work(preview, stop):
        preview(torch.zeros(1))
        begun.set()
        assert stopping.wait(60)
        return stop()

    job = Job(work, stopping)
    for _ in job:
        begun.wait()
        break
    assert job.result() is True


def test_a_job_raises_what_its_work_raised():
    def work(preview, stop):
        raise UserError("x: got 1, expected 2")

    job = Job(work, threading.Event())
    assert list(job) == []
    with pytest.raises(UserError, match="^x: got 1"):
        job.result()


def test_desks_are_apart_and_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(desks, "VISITORS", 2)
    kept = desks.Desks(tmp_path)
    first, second = kept.of("a"), kept.of("b")
    assert first is kept.of("a") and first is not second and first.folder != second.folder
    kept.of("c")  # b has been away for longest
    assert second.stopping.is_set() and not second.folder.exists() and first.folder.exists()
    kept.leave("a")
    assert first.stopping.is_set() and not first.folder.exists()
    assert kept.of("a") is not first
    assert Path(first.folder).parent == tmp_path
