"""Tests the page in Chromium, driven by Playwright, if both are installed."""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inception_jax.inference.gradcam import encode_png
from tests import served

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt install chromium)")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served.running(tmp_path_factory.mktemp("served")) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not work as root; the page is trusted.
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


class Watched:
    """A page that records its requests and problems."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page = browser.new_context(**context).new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[Watched]:
    opened = Watched(browser, address)
    yield opened
    opened.close()


@pytest.fixture
def image_file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "image.png"
    path.write_bytes(encode_png(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)))
    return path


def pressed(page: Any) -> str:
    return page.locator("#guesses button[aria-pressed=true] .name").inner_text()


def test_chosen_image_shows_classes_and_heat_map(
    watched: Watched, address: str, image_file: pathlib.Path
) -> None:
    page = watched.page
    playwright.expect(page.get_by_text("Take a photo")).to_be_hidden()
    page.get_by_label("Choose an image").set_input_files(image_file)
    rows = page.locator("#guesses button")
    playwright.expect(rows).to_have_count(5)
    assert pressed(page) == rows.first.locator(".name").inner_text()
    best = page.locator("#status").inner_text()
    assert best.startswith("Most probable: kind ") and best.endswith("%")
    for name in ("picture", "heat_map"):
        assert page.locator(f"#{name}").evaluate("e => e.complete && e.naturalWidth") == 384
    first = page.locator("#heat_map").get_attribute("src")

    # The evidence for the second class, selected with the keyboard.
    second = rows.nth(1).locator(".name").inner_text()
    rows.nth(1).focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#explained")).to_have_text(f"Evidence for “{second}”")
    assert pressed(page) == second
    assert page.locator("#heat_map").get_attribute("src") != first
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"

    assert not watched.problems
    asked = [url for url in watched.requests if not url.startswith("data:")]
    assert asked and all(url.startswith(f"{address}/") for url in asked)


def test_unreadable_file_shows_error(
    watched: Watched, image_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    page = watched.page
    page.get_by_label("Choose an image").set_input_files(text)
    error = page.get_by_role("alert")
    playwright.expect(error).to_contain_text("The image cannot be read")
    page.get_by_label("Choose an image").set_input_files(image_file)
    playwright.expect(page.locator("#guesses button")).to_have_count(5)
    playwright.expect(error).to_be_hidden()


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_image_can_be_dropped_and_pasted(
    watched: Watched, image_file: pathlib.Path, kind: str
) -> None:
    page = watched.page
    page.evaluate(
        """([kind, bytes]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
          const event = kind === "paste"
            ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
            : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
          document.body.dispatchEvent(event);
        }""",
        [kind, list(image_file.read_bytes())],
    )
    playwright.expect(page.locator("#guesses button")).to_have_count(5)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(
    browser: Any, address: str, image_file: pathlib.Path, scheme: str
) -> None:
    size = {"width": 360, "height": 640}
    phone = {"viewport": size, "has_touch": True, "is_mobile": True, "color_scheme": scheme}
    opened = Watched(browser, address, **phone)
    page = opened.page
    playwright.expect(page.get_by_text("Take a photo")).to_be_visible()
    assert page.get_by_label("Take a photo").get_attribute("capture") == "environment"
    page.get_by_label("Take a photo").set_input_files(image_file)
    playwright.expect(page.locator("#guesses button")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.removeprefix("rgb(").split(",")[0]) < 128) == (scheme == "dark")
    assert not opened.problems
    opened.close()
