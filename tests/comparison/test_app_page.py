"""The page of `lineage app` in a browser without a window, as a visitor uses it."""

from __future__ import annotations

import base64
import io
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'lineage-t2i[app]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=f"there is none of {', '.join(NAMES)}"),
    pytest.mark.slow,
]
PATIENCE = 60_000  # milliseconds


@dataclass
class Visit:
    """A page that is open in a browser.

    Attributes:
        page: Page of playwright.
        errors: Errors on the console, and answers of the server that are none.
        foreign: Requests to other hosts.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def status(self, name: str, words: str) -> str:
        """Wait until a status says some words; returns all that it says."""
        place = self.page.locator(f"#{name}")
        playwright.expect(place).to_contain_text(words, timeout=PATIENCE)
        return str(place.inner_text())

    def draw(self, caption: str) -> None:
        self.page.fill("#caption textarea", caption)
        self.page.click("#draw")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()


Serve = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture(scope="module")
def serve(command: Callable[..., subprocess.Popen[str]]) -> Serve:
    """Start `lineage app` in a process of its own; returns it, and the page's address."""

    def start(*runs: object) -> tuple[subprocess.Popen[str], str]:
        server = command("app", *runs, "--port", "0", "--threads", "1", "--device", "cpu")
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+) ", line)
        assert found, line or server.communicate()[1]
        return server, found[1]

    return start


@pytest.fixture(scope="module")
def address(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the page of three systems, and of a run that is broken."""
    broken = tmp_path_factory.mktemp("runs") / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    keys = ("gan_int_cls", "vqvae", "ddpm")
    server, address = serve(*(f"pretrained:{key}" for key in keys), broken)
    yield address
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=30)
    assert server.returncode == 130
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(address: str, browser: Any) -> Iterator[Callable[..., Visit]]:
    """Open the page, in a session of its own; afterwards nothing may have gone wrong in any."""
    visits: list[Visit] = []

    def start(width: int = 1400) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900})
        visits.append(one := Visit(context.new_page()))

        def request(request: Any) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                one.foreign.append(request.url)

        def answer(response: Any) -> None:
            if response.status >= 400:
                one.errors.append(f"{response.status} {response.url}")

        def message(message: Any) -> None:
            if message.type == "error":
                one.errors.append(message.text)

        one.page.on("request", request)
        one.page.on("response", answer)
        one.page.on("console", message)
        one.page.on("pageerror", lambda error: one.errors.append(str(error)))
        one.page.goto(address)
        one.page.wait_for_selector("#draw", timeout=PATIENCE)
        return one

    yield start
    for one in visits:
        assert one.errors == [] and one.foreign == []
        one.page.context.close()


def source(visit: Visit, selector: str) -> list[str]:
    """The pictures in a part of the page, as data URLs."""
    images = visit.page.locator(f"{selector} img")
    return [str(images.nth(i).get_attribute("src")) for i in range(images.count())]


def pixels(url: str) -> NDArray[np.int64]:
    """The picture in a data URL, (S, S, 3)."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64)


def test_a_caption_is_drawn_and_judged(visit: Callable[..., Visit]) -> None:
    one = visit()
    assert "history" in one.page.inner_text("h1")
    assert "config.json" in one.page.inner_text("body")  # the run that is broken
    one.page.get_by_label("VQ-VAE (2017)").first.uncheck()
    one.draw("a red circle")
    one.status("status", "All 2 systems are done")
    text = one.page.inner_text("#results")
    assert "GAN-INT-CLS" in text and "DDPM" in text and "VQ-VAE" not in text
    assert text.count("detected: ") == 2
    assert text.count("✓ right") + text.count("✗ wrong: ") == 2
    assert len(set(source(one, "#results"))) == 2
    one.draw("a house at dawn")
    one.status("status", "The judge cannot read this caption")


def test_a_wrong_option_is_a_sentence(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.page.locator("#options button").first.click()
    one.page.get_by_role("button", name="DDPM (2020)").click()
    one.page.get_by_label("sampler Name of the sampler").fill("ddimm")
    one.draw("a red circle")
    one.status("status", "All 3 systems are done")
    assert "did you mean 'ddim'" in one.page.inner_text("#results")
    one.draw(" ")
    one.status("status", "write a caption")


def test_the_slider_moves_over_the_steps(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.page.fill("#caption textarea", "a red circle")
    one.tab("How it came about")
    one.page.click("#show")
    playwright.expect(one.page.locator("#process img")).to_have_count(2, timeout=PATIENCE)
    last = source(one, "#process")
    one.page.locator("#step input[type=range]").evaluate(
        "slider => { slider.value = 2; slider.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    playwright.expect(one.page.locator("#process img").first).not_to_have_attribute("src", last[0])
    assert "x_t, sigma" in one.page.inner_text("#process")


def test_the_painted_part_is_repainted(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.draw("a red circle")
    one.status("status", "All 3 systems are done")
    one.tab("Repaint")
    one.page.click("#repaint")
    one.status("repaint-status", "no picture to start from")
    one.page.click("#take")
    canvas = one.page.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    one.page.wait_for_timeout(1500)  # the picture is drawn on the canvas, where nothing tells when
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    one.page.mouse.move(x - 60, y)
    one.page.mouse.down()
    one.page.mouse.move(x + 60, y, steps=15)
    one.page.mouse.up()
    one.page.wait_for_timeout(500)
    one.page.click("#repaint")
    one.status("repaint-status", "All 2 systems are done")
    assert "neither" not in one.page.inner_text("#repainted")
    before = pixels(source(one, "#results")[0])
    changed = np.abs(before - pixels(source(one, "#repainted")[1])).max(2) > 8  # of DDPM
    assert changed[12:20].any() and not changed[:10].any() and not changed[22:].any()


def test_a_second_visitor_waits_and_sees_for_what(visit: Callable[..., Visit]) -> None:
    one, two = visit(), visit()
    one.page.get_by_role("spinbutton").first.fill("8")
    one.draw("a red circle")
    one.status("status", "systems are done; ")
    two.draw("a blue square")
    assert "ahead of yours" in two.status("status", "Waiting: one drawing is")
    two.status("status", "All 3 systems are done")
    assert one.page.locator("#results img").count() == 24


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_page(
    width: int, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    one = visit(width)
    one.draw("a red circle left of a blue square")
    one.status("status", "All 3 systems are done")
    for name in ("Pictures", "How it came about", "Repaint"):
        one.tab(name)
        one.page.wait_for_timeout(300)
        one.page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
        assert one.page.evaluate("document.documentElement.scrollWidth") <= width


def test_ctrl_c_ends_it_although_a_page_is_open_and_draws(serve: Serve, browser: Any) -> None:
    server, address = serve("pretrained:vqgan_clip")
    page = browser.new_context().new_page()
    page.goto(address)
    page.get_by_role("spinbutton").first.fill("8")
    page.click("#draw")
    playwright.expect(page.locator("#status")).to_contain_text("VQGAN+CLIP draws", timeout=PATIENCE)
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=30)
    assert server.returncode == 130
    assert errors == "lineage: interrupted; the drawing is given up.\n"
    page.context.close()
