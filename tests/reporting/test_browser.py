"""The reports in a real browser: they open without an error or a request, and the controls work.

Skipped without Playwright or a Chromium: pip install -e '.[browser]', and apt install chromium or
playwright install chromium.
"""

import itertools
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from inception_jax.config import Train
from inception_jax.reporting import report
from tests import run_folders

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

HOSTILE = "<script>window.hacked = 1</script>"
NAMES = (HOSTILE, '"><img src=x onerror="window.hacked = 1">', *(f"class {n}" for n in range(28)))
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
        paths = [path for path in (*found, driver.chromium.executable_path) if path]
        path = next((path for path in paths if pathlib.Path(path).exists()), None)
        if path is None:
            pytest.skip(
                "there is no Chromium: apt install chromium, or playwright install chromium"
            )
        # A container's root user has no sandbox; the pages are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A report of one run, of one without predictions, and a comparison of two."""
    folder = tmp_path_factory.mktemp("runs")
    one = run_folders.write(
        folder / "one",
        names=NAMES,
        experiment={"file": "experiments/made_up.py", "own": {"train.batch_size": 32}},
    )
    longer = run_folders.config(train=Train(batch_size=36, duration="800 steps"))
    other = run_folders.write(folder / "other", names=NAMES, settings=longer, skill=2.0)
    bare = folder / "bare"
    bare.mkdir()
    shutil.copy(one / "metrics.jsonl", bare)
    return {
        "one": report.write_page(one),
        "bare": report.write_page(bare),
        "both": report.write_comparison([one, other], folder / "both.html"),
    }


class Opened:
    """A page in the browser, and what it asked for and complained of."""

    def __init__(self, browser: Any, path: pathlib.Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.path = path

    def check(self) -> None:
        assert self.complaints == []
        asked = [url for url in self.requests if not url.startswith("data:")]
        assert set(asked) == {self.path.as_uri()}


@pytest.fixture
def opened(request: pytest.FixtureRequest, browser: Any, pages: dict[str, pathlib.Path]) -> Any:
    """The page that the test is parametrized with; checked at its end, too."""
    name, options = getattr(request, "param", ("one", {}))
    found = Opened(browser, pages[name], **options)
    yield found.page
    found.check()
    found.context.close()


def ticks(page: Any, metric: str = "loss") -> list[float]:
    """Returns the numbers along the horizontal axis of a chart."""
    texts = page.locator(f'[data-metric="{metric}"] text[text-anchor="middle"]').all_text_contents()
    return [float(text) for text in texts if text[:1].isdigit()]


def background(page: Any) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("opened", [("one", {}), ("bare", {}), ("both", {})], indirect=True)
def test_it_opens_with_its_curves(opened: Any) -> None:
    assert opened.locator(".chart:visible").count() == 5
    paths = opened.locator('[data-metric="loss"] path.curve')
    assert paths.count() >= 2
    assert all(paths.nth(n).get_attribute("d") for n in range(paths.count()))
    # Names that are markup stayed names.
    assert opened.evaluate("window.hacked") is None


def test_pictures_show_and_hostile_names_are_text(opened: Any) -> None:
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length"
    opened.locator("#mistakes").scroll_into_view_if_needed()
    opened.wait_for_function(f"{broken} === 0")
    assert opened.locator("img").count() == 36
    opened.get_by_text("All 30 classes as a table").click()
    assert opened.locator("#class-table tbody th").first.inner_text() == HOSTILE
    assert opened.evaluate("window.hacked") is None


def test_the_axis_can_be_hours(opened: Any) -> None:
    assert ticks(opened)[-1] == 10
    opened.get_by_text("hours", exact=True).first.click()
    assert "hours" in opened.locator('[data-metric="loss"] svg').text_content()
    assert max(ticks(opened)) <= 200 / 3600
    opened.keyboard.press("ArrowLeft")
    assert ticks(opened)[-1] == 10


def test_a_drag_zooms_all_charts_and_a_double_click_zooms_out(opened: Any) -> None:
    plot = opened.locator('[data-metric="loss"] .plot')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    y = box["y"] + box["height"] / 2
    opened.mouse.move(box["x"] + box["width"] * 0.5, y)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] * 0.75, y, steps=4)
    assert opened.locator(".selection").count() == 1
    opened.mouse.up()
    for metric in ("loss", "top1"):
        seen = ticks(opened, metric)
        assert min(seen) > 3 and max(seen) < 9
    assert opened.get_by_role("button", name="Reset zoom").is_enabled()
    plot.dblclick()
    assert (ticks(opened)[0], ticks(opened)[-1]) == (0, 10)
    assert opened.get_by_role("button", name="Reset zoom").is_disabled()


def test_a_chart_can_be_read_with_the_keyboard(opened: Any) -> None:
    plot = opened.locator('[data-metric="top1"] .plot')
    plot.focus()
    opened.keyboard.press("End")
    last = {line["split"]: line for line in run_folders.lines()[-2:]}
    said = opened.locator("#said").inner_text()
    assert said.startswith("Top-1 accuracy, epoch 10: ")
    for split, words in (("train", "training"), ("test", "test")):
        top1 = float(f"{last[split]['top1']:.4g}")
        assert f"{words} {top1:g}%" in said
    opened.keyboard.press("ArrowLeft")
    assert "epoch 9.75: " in opened.locator("#said").inner_text()
    assert opened.locator('[data-metric="top1"] .tip').is_visible()
    opened.keyboard.press("+")
    assert min(ticks(opened, "top1")) > 4
    opened.keyboard.press("0")
    assert ticks(opened, "top1")[0] == 0


def test_a_curve_can_be_hidden(opened: Any) -> None:
    curves = opened.locator('[data-metric="loss"] path.curve')
    assert curves.count() == 2
    button = opened.locator("#legend").get_by_role("button", name="training")
    button.click()
    assert (curves.count(), button.get_attribute("aria-pressed")) == (1, "false")
    button.click()
    assert curves.count() == 2


def column(page: Any, table: str, index: int) -> list[str]:
    cells = page.locator(f"{table} tbody tr > :nth-child({index})")
    return cells.all_inner_texts()


@pytest.mark.parametrize("opened", [("both", {})], indirect=True)
def test_runs_can_be_sorted_by_any_column(opened: Any) -> None:
    heads = opened.locator("#run-table th button")
    names = heads.all_inner_texts()
    assert "train.duration.steps" in names
    for index in range(heads.count()):
        head = opened.locator("#run-table thead th").nth(index)
        orders = []
        for _ in range(2):
            heads.nth(index).click()
            orders.append(column(opened, "#run-table", index + 1))
        assert head.get_attribute("aria-sort") in ("ascending", "descending")
        assert opened.locator("#run-table [aria-sort]").count() == 1
        if len(set(orders[0])) == 2:
            assert orders[0] == orders[1][::-1], names[index]
    # A number's first click brings the largest to the top.
    heads.nth(names.index("top-1, %")).click()
    values = [float(text) for text in column(opened, "#run-table", 2)]
    assert values == sorted(values, reverse=True)


def test_classes_are_sorted_as_numbers(opened: Any) -> None:
    opened.get_by_text("All 30 classes as a table").click()
    button = opened.locator("#class-table").get_by_role("button", name="accuracy")
    for reverse in (True, False):
        button.click()
        values = [float(text) for text in column(opened, "#class-table", 2)]
        assert values == sorted(values, reverse=reverse)
        assert len(set(values)) > 5


def test_settings_can_be_found(opened: Any) -> None:
    opened.locator("#settings summary").click()
    opened.get_by_placeholder("learning rate").fill("learning_rate")
    shown = opened.locator("#all-settings tbody tr:visible th").all_inner_texts()
    assert "schedule.learning_rate" in shown and "train.batch_size" not in shown
    opened.get_by_placeholder("learning rate").fill("")
    opened.get_by_label("only those that are not the default").check()
    shown = opened.locator("#all-settings tbody tr:visible th").all_inner_texts()
    assert "train.batch_size" in shown and "train.aux_weight" not in shown


@pytest.mark.parametrize(
    "opened",
    [("one", {"color_scheme": "light"}), ("one", {"color_scheme": "dark"})],
    indirect=True,
    ids=["light", "dark"],
)
def test_the_theme_follows_the_system_until_it_is_set(
    opened: Any, request: pytest.FixtureRequest
) -> None:
    light, dark = "rgb(246, 247, 249)", "rgb(20, 23, 28)"
    own = dark if "dark" in request.node.callspec.id else light
    button = opened.locator("#theme")
    assert background(opened) == own
    button.click()
    assert (background(opened), button.inner_text()) == (light, "Theme: light")
    button.click()
    assert background(opened) == dark
    opened.reload()
    assert (background(opened), button.inner_text()) == (dark, "Theme: dark")
    button.click()
    assert background(opened) == own


@pytest.mark.parametrize(
    "opened", [("one", {"viewport": PHONE}), ("both", {"viewport": PHONE})], indirect=True
)
def test_a_phone_shows_it_without_scrolling_sideways(opened: Any) -> None:
    for summary in opened.locator("summary").all():
        summary.click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    sizes = "[...document.querySelectorAll('button')].map(b => b.getBoundingClientRect().height)"
    assert min(size for size in opened.evaluate(sizes) if size) >= 20


def test_what_a_screen_reader_needs_is_there(opened: Any) -> None:
    named = "button, a, input, svg[role], [role=region], [role=application], nav, fieldset"
    nameless = (
        f"[...document.querySelectorAll('{named}')].filter(each => !(each.ariaLabel ||"
        " each.textContent.trim() || each.labels?.length)).map(each => each.outerHTML)"
    )
    assert opened.evaluate(nameless) == []
    levels = opened.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for table in opened.locator("table").all():
        assert table.locator("th[scope=col]").count() > 0
    ids = opened.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "opened", [("one", {"java_script_enabled": False})], indirect=True, ids=["no script"]
)
def test_without_its_script_the_values_are_still_there(opened: Any) -> None:
    assert opened.get_by_text("switched off").is_visible()
    opened.get_by_text("The values as a table").click()
    last = run_folders.lines()[-1]
    assert opened.get_by_role("cell", name=f"{last['top1']:.2f}").first.is_visible()


def test_screenshots_are_not_empty(opened: Any, tmp_path: pathlib.Path) -> None:
    """What they look like is for the eye; that something is drawn can be tested."""
    picture = opened.screenshot(path=tmp_path / "page.png", full_page=True)
    assert len(picture) > 50_000
