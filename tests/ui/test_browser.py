"""The page on the packaged model, in a real browser and asked as no browser asks; needs the extra `ui`.

`TAMINGFAST_SCREENSHOTS=FOLDER` keeps a picture of each tab.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import golden
import numpy as np
import pytest
import tiny
from PIL import Image

from tamingfast import tasks
from tamingfast.ui import server

pytest.importorskip("gradio", reason="the page needs gradio: make test-page installs it")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
#: Milliseconds that a slow machine may take for one step.
PATIENCE = 240_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    os.environ["no_proxy"] = "127.0.0.1"
    with server.served(tasks.Unread("demo", "cpu"), port=None) as (_, where):
        yield where.rstrip("/")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(address, browser):
    """The opened page, which must not fail, and must ask nobody but its own server."""
    opened = browser.new_page(viewport={"width": 1280, "height": 960})
    opened.set_default_timeout(PATIENCE)
    asked, failed = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(address)
    opened.get_by_role("button", name="Draw", exact=True).wait_for()
    yield opened
    opened.close()
    assert not failed
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(tiny.photographs(1, 64)[0]).save(path)
    return path


def keep(page, name: str) -> None:
    if folder := os.environ.get("TAMINGFAST_SCREENSHOTS"):
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(folder, f"{name}.png"), full_page=True)


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def upload(page, label: str, path: Path) -> None:
    """Give a file to the field that has this label, in the tab that is shown."""
    field = page.locator(".block", has_text=label).locator("visible=true")
    field.locator("input[type=file]").first.set_input_files(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def downloaded(page, name: str, place: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"a[download='{name}']").locator("visible=true").first.click()
    waiting.value.save_as(place / name)
    return place / name


def test_sampling_and_repeating(page, tmp_path):
    press(page, "Draw")
    page.get_by_text("16 images of 32x32 pixels in").wait_for()
    keep(page, "page-sample")
    drawn = downloaded(page, "samples.png", tmp_path)
    expected = tasks.sample(tasks.Unread("demo", "cpu"), 16, size=(32, 32))
    expected.save(tmp_path / "expected.png")
    assert (pixels(drawn) == pixels(tmp_path / "expected.png")).all()
    one = tasks.sample(tasks.Unread("demo", "cpu"), 2, label="frog", options=tasks.DrawingOptions(seed=7))
    one.save(tmp_path / "frogs.png")
    upload(page, "Repeat a picture", tmp_path / "frogs.png")
    page.get_by_text("The fields are those of the picture").wait_for()
    assert page.get_by_label("Seed").locator("visible=true").input_value() == "7"
    press(page, "Draw")
    page.get_by_text("2 images of 32x32 pixels in").wait_for()
    (tmp_path / "again").mkdir()
    assert (pixels(downloaded(page, "samples.png", tmp_path / "again")) == pixels(tmp_path / "frogs.png")).all()


def test_errors_are_sentences_and_stop_stops(page):
    page.get_by_label("Height").locator("visible=true").fill("33")
    press(page, "Draw")
    page.get_by_text("size: got 33x32 pixels, expected multiples of 4").wait_for()
    for side in ("Height", "Width"):
        page.get_by_label(side).locator("visible=true").fill("96")
    press(page, "Draw")
    page.get_by_text("Drawing ...").wait_for()  # a preview has come
    keep(page, "page-live")
    press(page, "Stop")
    page.get_by_text("Stopped after").wait_for()


def test_painting(page, photo, tmp_path):
    page.get_by_role("tab", name="Paint").click()
    upload(page, "Open a photo or a saved canvas", photo)
    page.get_by_text("Brush over what is to change. 32x32 pixels.").wait_for()
    brush(page)
    press(page, "Redraw what is brushed")
    page.get_by_text("Drawn in").wait_for()
    (tmp_path / "redrawn").mkdir()
    redrawn = pixels(downloaded(page, "painting.png", tmp_path / "redrawn"))
    before = pixels(photo)
    assert redrawn.shape == (32, 32, 3) and before.shape == (64, 64, 3)
    assert tasks.recipe_of(tmp_path / "redrawn/painting.png").task == "edit"
    assert (downloaded(page, "painting.canvas", tmp_path)).stat().st_size > 0
    press(page, "Extend")
    page.get_by_text("32x48 pixels.").wait_for()
    keep(page, "page-paint")
    press(page, "Undo the last step")
    page.get_by_text("The last step is undone. 32x32 pixels.").wait_for()
    (tmp_path / "undone").mkdir()
    assert (pixels(downloaded(page, "painting.png", tmp_path / "undone")) == redrawn).all()


def test_the_other_tabs(page, photo):
    page.get_by_role("tab", name="Reconstruct").click()
    upload(page, "Image", photo)
    page.wait_for_timeout(1500)
    press(page, "Reconstruct")
    page.get_by_text("256x256 pixels as 64x64 tokens").wait_for()
    keep(page, "page-reconstruct")
    page.get_by_role("tab", name="Condition").click()
    page.get_by_text("This model draws from classes.").wait_for()
    page.get_by_role("tab", name="Inspect").click()
    press(page, "Show the model")
    page.get_by_text("cond_transformer.Net2NetTransformer").wait_for()


def brush(page) -> None:
    """A stroke through the middle of the editor that is shown."""
    page.wait_for_timeout(3000)  # the editor draws its picture anew
    box = page.locator("canvas").locator("visible=true").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y)
    page.mouse.down()
    for step in range(5):
        page.mouse.move(x - 60 + 30 * step, y + 10 * step)
    page.mouse.up()
    page.wait_for_timeout(1500)


def test_drawing_a_label_map(browser, tmp_path):
    with server.served(tasks.Unread(golden.checkpoint("net2net_seg"), "cpu")) as (_, where):
        opened = browser.new_page(viewport={"width": 1280, "height": 960})
        opened.set_default_timeout(PATIENCE)
        opened.goto(where)
        opened.get_by_text("see the tab Condition").wait_for()
        opened.get_by_role("tab", name="Condition").click()
        press(opened, "New drawing")
        brush(opened)
        press(opened, "Draw")
        opened.get_by_text("4 images of 32x32 pixels in").wait_for()
        keep(opened, "page-condition")
        drawn = downloaded(opened, "drawn.png", tmp_path)
        opened.close()
    shown = pixels(drawn)[2:34, 2:34].reshape(-1, 3)  # the condition comes first
    assert len(np.unique(shown, axis=0)) == 2  # the first label, and the second where the brush went


def test_on_a_phone(address, browser):
    opened = browser.new_page(viewport={"width": 390, "height": 844})
    opened.set_default_timeout(PATIENCE)
    opened.goto(address)
    opened.get_by_role("button", name="Draw", exact=True).wait_for()
    wide = opened.evaluate("document.documentElement.scrollWidth")
    press(opened, "Draw")
    drawn = opened.locator(".tf-results .tf-picture img").first
    drawn.wait_for()
    box = drawn.bounding_box()
    keep(opened, "page-phone")
    opened.close()
    assert wide <= 390
    # What was drawn is in sight, though the button lies below all settings.
    assert box["height"] > 100 and box["y"] >= 0 and box["y"] + box["height"] <= 844


def status(url: str, body: bytes | None = None) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def asked(address: str, path: str) -> str:
    """What the server says of an upload that is said to lie at ``path``."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    config = json.load(opener.open(f"{address}/config", timeout=60))
    number = next(
        each["id"]
        for each in config["dependencies"]
        if [t[1] for t in each["targets"]] == ["change"] and len(each["inputs"]) == 1 and len(each["outputs"]) == 1
    )
    data = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [data], "fn_index": number, "session_hash": "somebody", "trigger_id": None}
    join = urllib.request.Request(
        f"{address}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener.open(join, timeout=60).read()
    with opener.open(f"{address}/gradio_api/queue/data?session_hash=somebody", timeout=120) as answer:
        for line in answer:
            if b"process_completed" in line:
                return line.decode()
    raise AssertionError("no answer")


def test_no_path_of_the_machine_is_served_or_read(address, tmp_path):
    secret = tmp_path / "secret.png"
    tasks.sample(tasks.Unread("demo", "cpu"), 1).save(secret)
    for path in (secret, Path("/etc/passwd"), Path.cwd() / "pyproject.toml", Path(server.__file__)):
        assert status(f"{address}/gradio_api/file={path}") in (403, 404)
        assert status(f"{address}/file={path}") in (403, 404)
        answer = asked(address, str(path))
        assert '"success":false' in answer.replace(" ", "") and "recipe" not in answer


def test_it_listens_to_this_machine_and_shares_nothing(address):
    port = int(address.rpartition(":")[2])
    assert address == f"http://127.0.0.1:{port}"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=10)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    config = json.load(opener.open(f"{address}/config", timeout=60))
    assert config["analytics_enabled"] is False and not config.get("share_url")
    assert not any(each["api_visibility"] == "public" for each in config["dependencies"])


def test_no_address_is_fetched(address):
    answer = asked(address, f"{address}/config")
    assert "An upload is a file, not an address" in answer


def test_a_taken_port_is_said(address):
    port = int(address.rpartition(":")[2])
    taken = server.served(tasks.Unread("demo", "cpu"), port=port)
    with pytest.raises(ValueError, match=f"^port: got {port} on 127.0.0.1, which cannot be listened on"), taken:
        pass
