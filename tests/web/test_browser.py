"""The page in a real headless browser, with a real run behind it: make test-web."""

import io
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-web")
pytest.importorskip("nicegui", reason="needs the extra web: make test-web")

pytestmark = pytest.mark.web
SECONDS = 60
TEXT, DRAW = "Text, English or Chinese", "Draw"
BOX_TEXT, REDRAW = "What the box should show", "Redraw the box"
_CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Server:
    """`cogview2 web` in a process of its own."""

    address: str
    process: "subprocess.Popen[str]"

    @property
    def root(self) -> str:
        """The address without its token."""
        return self.address.rsplit("/", 2)[0]


@pytest.fixture(scope="module")
def server(finished_run: tiny_runs.Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve the tiny run on a free port; the folder it is started in must stay empty."""
    folder = tmp_path_factory.mktemp("server")
    errors = folder.parent / "web-errors.txt"
    argv = [sys.executable, "-m", "cogview2.stages.commands.web", str(finished_run.run.path), "--port", "0"]
    with open(errors, "w") as file:
        process = subprocess.Popen(
            argv, cwd=folder, env=tiny_runs.environment(), stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        assert process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
        line = lines.get(timeout=SECONDS)
        assert line.startswith("open http://127.0.0.1:"), f"{line!r}\n{errors.read_text()}"
        yield Server(line.split()[1], process)
        process.terminate()
        assert process.wait(20) == 0
        assert errors.read_text() == ""
        assert list(folder.iterdir()) == []
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that can reach nothing but this machine."""
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _CHROMIUMS)), None)
    if chromium is None:
        pytest.skip("needs a Chromium on PATH, or its path in CHROMIUM")
    arguments = [
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--disable-background-networking",
    ]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """An open page; whatever it asked for must be of this server, and no script may have failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url.replace("ws:", "http:", 1)))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.goto(server.address)
    page.get_by_role("button", name=DRAW).wait_for()
    yield page
    context.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((server.address, "data:", "blob:"))] == []
    assert problems == []


def draw(page: Any, text: str, *, seed: int = 0, pictures: int = 1) -> list[Any]:
    """Draw, and return the figures."""
    page.get_by_label(TEXT).fill(text)
    page.get_by_role("spinbutton", name="Seed").fill(str(seed))
    page.get_by_role("spinbutton", name="Pictures").fill(str(pictures))
    page.get_by_role("button", name=DRAW, exact=True).click()
    page.get_by_role("button", name="Stop").locator("visible=true").wait_for()
    page.get_by_role("button", name="Stop").locator("visible=true").wait_for(state="detached")
    figures = page.locator("figure").filter(has=page.get_by_alt_text(f"Drawn for: {text}"))
    sync_api.expect(figures).to_have_count(pictures)
    return list(figures.all())


def download(page: Any, figure: Any) -> Image.Image:
    """Download the picture of a figure by its link."""
    with page.expect_download() as waiting:
        figure.get_by_role("link", name="Download").click()
    assert re.fullmatch(r"cogview2-seed\d+-\d+\.png", waiting.value.suggested_filename)
    return Image.open(waiting.value.path())


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def alert(page: Any) -> str:
    """Return the sentence that the page shows."""
    shown = page.get_by_role("alert").locator("visible=true")
    shown.wait_for()
    assert "Traceback" not in page.content()
    return str(shown.inner_text())


def upload(page: Any, data: bytes, name: str = "picture.png") -> None:
    """Choose a file in the open tab."""
    field = page.locator(".q-tab-panel input[type=file]")
    field.set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def some_png(size: tuple[int, int] = (90, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw a box with the mouse, in shares of the picture."""
    frame = page.get_by_alt_text("The picture to edit").bounding_box()
    at = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in (start, end)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=6)
    page.mouse.up()


def test_pictures_are_drawn_shown_and_downloaded(page: Any, tmp_path: Path) -> None:
    text = "a red circle <b>left</b> of a blue square"
    figures = draw(page, text, seed=7, pictures=2)
    page.screenshot(path=tmp_path / "generate.png", full_page=True)
    first = download(page, figures[0])
    assert first.text["Description"] == text and first.text["Seed"] == "7"  # type: ignore[attr-defined]
    side = page.get_by_alt_text(f"Drawn for: {text}").first.evaluate("image => image.naturalWidth")
    assert first.size == (side, side)
    second = download(page, figures[1])
    assert {first.text["Number"], second.text["Number"]} == {"0", "1"}  # type: ignore[attr-defined]
    assert not np.array_equal(pixels(first), pixels(second))

    again = {
        image.text["Number"]: pixels(image)
        for image in (download(page, f) for f in draw(page, text, seed=7, pictures=2))
    }
    assert np.array_equal(again[first.text["Number"]], pixels(first))  # type: ignore[attr-defined]
    other = download(page, draw(page, text, seed=8)[0])
    assert not np.array_equal(pixels(other), again["0"])


def test_a_box_is_drawn_with_the_mouse_and_redrawn_by_the_model(page: Any, tmp_path: Path) -> None:
    before = download(page, figure := draw(page, "a red circle", seed=3)[0])
    figure.get_by_role("button", name="Edit").click()
    page.get_by_alt_text("The picture to edit").wait_for()
    drag(page, (0.26, 0.3), (0.74, 1.4))  # beyond the lower edge
    side = before.width
    left, top, right = int(0.26 * side), int(0.3 * side), -int(-0.74 * side // 1)
    said = page.get_by_text(re.compile(r"^Box of \d+ x \d+ pixels at"))
    said.wait_for()
    width, height, x, y = map(int, re.findall(r"\d+", said.inner_text()))
    assert abs(x - left) <= 1 and abs(y - top) <= 1 and abs(x + width - right) <= 1 and y + height == side
    page.get_by_label(BOX_TEXT).fill("a blue square")
    page.screenshot(path=tmp_path / "box.png", full_page=True)
    page.get_by_role("button", name=REDRAW).click()
    page.get_by_alt_text("After for: a blue square").wait_for()
    page.screenshot(path=tmp_path / "edit.png", full_page=True)
    shown = page.get_by_alt_text("The picture before")
    assert shown.evaluate("image => image.naturalWidth") == side
    after = download(
        page, page.locator("figure").filter(has=page.get_by_alt_text("After for: a blue square"))
    )
    assert after.size == before.size
    inside = (slice(y, y + height), slice(x, x + width))
    assert not np.array_equal(pixels(after)[inside], pixels(before)[inside])

    page.get_by_role("button", name="Edit further").click()
    sync_api.expect(page.get_by_text("Draw a box around what should change.")).to_be_visible()
    sync_api.expect(page.locator(".box-image .edge")).to_have_count(0)


def test_a_box_is_made_with_the_keyboard_too(page: Any) -> None:
    page.get_by_role("tab", name="Edit").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name=REDRAW).wait_for()
    page.get_by_role("button", name="Choose a picture").focus()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "picture.png", "mimeType": "image/png", "buffer": some_png()})
    canvas = page.get_by_role("application")
    canvas.wait_for()
    canvas.focus()
    words = page.get_by_text(re.compile(r"^Box of \d+ x \d+ pixels at"))
    found = []
    for keys in ("Control+ArrowRight", "Control+Shift+ArrowDown", "Control+ArrowUp"):
        page.keyboard.press(keys)
        page.wait_for_timeout(300)
        found.append([int(number) for number in re.findall(r"\d+", words.inner_text())])
    (width, height, x, y), larger, higher = found
    assert larger == [width, height + 1, x, y] and higher == [width, height + 1, x, y - 1]
    page.keyboard.press("Escape")
    sync_api.expect(page.get_by_text("Draw a box around what should change.")).to_be_visible()


def test_an_uploaded_picture_is_described_in_two_languages(page: Any, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Caption").click()
    upload(page, some_png())
    page.get_by_alt_text("The picture to describe").wait_for()
    page.get_by_role("button", name="Describe").click()
    rows = page.locator("table.captions tbody tr")
    rows.first.wait_for()
    page.screenshot(path=tmp_path / "caption.png", full_page=True)
    assert rows.locator("th").all_inner_texts() == ["English", "Chinese"]
    for row in rows.all():
        text, score = row.locator("td").all_inner_texts()
        assert text and float(score) < 0


def test_errors_are_sentences(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name=DRAW, exact=True).click()
    assert alert(page) == "The text is empty. Say what to draw."
    page.get_by_role("spinbutton", name="Seed").fill("")
    page.get_by_label(TEXT).fill("a circle")
    page.get_by_role("button", name=DRAW, exact=True).click()
    sync_api.expect(page.get_by_role("alert").locator("visible=true")).to_contain_text("whole number")
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("button", name=REDRAW).click()
    assert "no picture yet" in alert(page)
    upload(page, b"#!/bin/sh\nexit", name="../../etc/passwd.png")
    shown = page.get_by_role("alert").locator("visible=true")
    sync_api.expect(shown.filter(has_text="no picture; choose")).to_be_visible()
    page.screenshot(path=tmp_path / "error.png", full_page=True)
    upload(page, some_png())
    page.get_by_alt_text("The picture to edit").wait_for()
    sync_api.expect(shown).to_have_count(0)
    page.get_by_role("button", name=REDRAW).click()
    assert "no box yet" in alert(page)


def test_a_job_can_be_stopped(page: Any) -> None:
    page.get_by_label(TEXT).fill("a red circle")
    page.get_by_role("spinbutton", name="Pictures").fill("8")
    page.get_by_role("button", name=DRAW, exact=True).click()
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    assert alert(page) == "Stopped."
    draw(page, "a blue square")


def test_a_narrow_window_needs_no_sideways_scrolling(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    for tab in ("Generate", "Edit", "Caption"):
        page.get_by_role("tab", name=tab).click()
        page.locator(".q-tab-panel .card").first.wait_for()
        page.screenshot(path=tmp_path / f"narrow-{tab.lower()}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_without_the_token_there_is_nothing(browser: Any, server: Server, page: Any) -> None:
    text = "a red circle"
    draw(page, text)
    picture = page.get_by_alt_text(f"Drawn for: {text}").get_attribute("src")
    context = browser.new_context()
    other = context.new_page()
    for path in (
        "/",
        "/wrong/",
        f"/wrong/{picture}",
        f"/{picture}",
        "/_nicegui_ws/socket.io/?EIO=4&transport=polling",
    ):
        answer = other.goto(server.root + path)
        assert answer.status == 403, path
        assert "token" in other.inner_text("body")
    assert other.goto(f"{server.address}{picture}").status == 200
    assert context.cookies() == []
    context.close()


def test_a_page_of_another_origin_can_open_no_websocket(browser: Any, server: Server) -> None:
    context = browser.new_context()
    other = context.new_page()
    other.goto("about:blank")
    opened = other.evaluate(
        """address => new Promise(resolve => {
            const socket = new WebSocket(address);
            socket.onopen = () => resolve("open");
            socket.onerror = () => resolve("refused");
        })""",
        server.address.replace("http:", "ws:", 1) + "_nicegui_ws/socket.io/?EIO=4&transport=websocket",
    )
    assert opened == "refused"
    context.close()
