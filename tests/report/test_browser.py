"""
The page in a real browser: what only shows when it runs. Skipped where there is no Chromium or no
playwright to drive it; with OANET_REQUIRE_BROWSER=1, as in continuous integration, that is a failure.
"""

import os
import re
import shutil

import pytest

from oanet_d2.report import write_report
from tests.report.conftest import change_json, read_json
from tests.report.test_page import HOSTILE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    *["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"],
    *["--disable-background-networking", "--disable-component-update"],
]
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
SMALLEST_FONT = 12  # pixels


def unavailable(reason):
    if os.environ.get("OANET_REQUIRE_BROWSER") == "1":
        pytest.fail(f"OANET_REQUIRE_BROWSER is 1, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        unavailable(f"none of {', '.join(NAMES)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed")
    with sync_playwright() as playwright:
        # launch() gives it a fresh user data directory
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page, and all that it complained of or asked the network for."""

    def __init__(self, browser, path, viewport=WIDE, scheme="light"):
        self.context = browser.new_context(
            viewport=viewport, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.complaints, self.requests, self.answered = [], [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfinished", lambda request: self.answered.append(request.url))
        self.page.goto(f"file://{path}")

    def close(self):
        self.context.close()


@pytest.fixture(scope="module")
def written(evaluated, tmp_path_factory):
    """The folder of a report; not to be changed."""
    folder = tmp_path_factory.mktemp("written") / "output"
    shutil.copytree(evaluated, folder)
    write_report(str(folder))
    return folder


@pytest.fixture
def open_report(browser):
    opened = []

    def open_report(folder, **options):
        opened.append(Opened(browser, folder / "report.html", **options))
        return opened[-1]

    yield open_report
    for page in opened:
        page.close()


def visible_cases(page):
    return page.locator(".case:visible").count()


def test_it_renders_without_network_or_complaint(open_report, written):
    opened = open_report(written)
    page = opened.page
    page.get_by_role("combobox", name="Class").select_option(index=1)
    page.locator("summary").last.click()
    page.wait_for_load_state("networkidle")
    assert opened.complaints == []
    asked = [url for url in opened.requests if not url.startswith("data:")]
    assert asked == [f"file://{written}/report.html"]
    assert "Painting orders on" in page.get_by_role("heading", level=1).inner_text()
    for title in ("Orders", "Classes", "Overlaps", "Pictures"):
        assert page.get_by_role("heading", level=2, name=title).is_visible()
    assert page.locator(".plot svg:visible").count() == 1


def test_pictures_are_shown(open_report, written):
    page = open_report(written).page
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    sizes = page.evaluate("[...document.images].map((x) => [x.naturalWidth, x.naturalHeight])")
    assert len(sizes) == 3 * len(read_json(written)["cases"])
    assert all(size == [480, 480] for size in sizes)
    boxes = [image.bounding_box() for image in page.locator(".compare img").all()]
    assert all(box["width"] > 200 and abs(box["width"] - box["height"]) < 1 for box in boxes)
    # the photo behind them is a picture too: its pixels are not all alike
    assert (
        page.evaluate(
            """async () => {
            const style = getComputedStyle(document.querySelector(".compare .photo"));
            const image = new Image();
            image.src = style.backgroundImage.slice(5, -2);
            await image.decode();
            return image.naturalWidth;
        }"""
        )
        == 96
    )


def test_filters(open_report, written):
    page = open_report(written).page
    cases = read_json(written)["cases"]
    shown = page.get_by_role("status")

    def expect(fitting):
        assert visible_cases(page) == len(fitting)
        assert shown.inner_text() == f"{len(fitting)} of {len(cases)} cases"
        assert page.locator("#none").is_visible() == (not fitting)

    expect(cases)
    combinations = 0
    for section, label in (("lost", "loses"), ("won", "gains"), ("still_wrong", "still wrong")):
        page.get_by_role("radio", name=re.compile(label)).check()
        of_section = [c for c in cases if c["section"] == section]
        page.get_by_role("combobox", name="Class").select_option("")
        expect(of_section)
        for name in {str(c) for case in cases for c in case["classes"]}:
            page.get_by_role("combobox", name="Class").select_option(name)
            expect([c for c in of_section if int(name) in c["classes"]])
            combinations += 1
    assert combinations > 6
    page.get_by_role("radio", name="all").check()
    page.get_by_role("combobox", name="Class").select_option("")
    expect(cases)


def shares(compare):
    """How far the two layers reach, from the left and from the right, in pixels."""
    clip = "(x) => getComputedStyle(x).clipPath"
    width = compare.bounding_box()["width"]
    before = compare.locator(".before").evaluate(clip)
    after = compare.locator(".after").evaluate(clip)

    def percent(inset):
        return [float(x) for x in re.findall(r"([-\d.]+)%", inset)] or [0.0]

    return 100 - percent(before)[0], percent(after)[-1], width


def test_slider_by_mouse_and_keyboard(open_report, written):
    page = open_report(written).page
    compare = page.locator(".compare").first
    compare.scroll_into_view_if_needed()
    slider = compare.get_by_role("slider")
    assert "score" in slider.get_attribute("aria-label")
    assert slider.input_value() == "50"
    box = compare.bounding_box()

    def picture():
        return compare.screenshot()

    half = picture()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.6 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.98 * box["width"], box["y"] + 0.6 * box["height"], steps=5)
    page.mouse.up()
    assert int(slider.input_value()) >= 96
    before, after, _ = shares(compare)
    assert before == after == int(slider.input_value())
    first_order = picture()
    slider.focus()
    page.keyboard.press("Home")
    assert slider.input_value() == "0" and shares(compare)[:2] == (0, 0)
    second_order = picture()
    assert len({half, first_order, second_order}) == 3
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "1"
    others = page.locator(".compare input").all()[1:]
    assert all(other.input_value() == "50" for other in others)


def test_everything_is_reached_by_keyboard(open_report, written):
    page = open_report(written).page
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("(document.activeElement.type || document.activeElement.tagName)")
        )
    for kind in ("A", "SUMMARY", "radio", "select-one", "range"):
        assert kind in reached
    # what has the focus can be seen
    page.locator(".compare input").first.focus()
    page.keyboard.press("ArrowLeft")
    outline = page.locator(".compare").first.evaluate("(x) => getComputedStyle(x).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("viewport, scheme", [(PHONE, "light"), (PHONE, "dark"), (WIDE, "light")])
def test_legible(open_report, written, viewport, scheme):
    opened = open_report(written, viewport=viewport, scheme=scheme)
    page = opened.page
    for summary in page.locator("summary").all():
        if not summary.evaluate("(x) => x.parentElement.open"):
            summary.click()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == viewport["width"]
    page_color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", page_color))) < 150) == (scheme == "dark")
    # Every text: its font on the screen, and its contrast with the background behind it (WCAG).
    texts = page.evaluate(
        """() => {
            const channel = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
            const light = ([r, g, b]) =>
                0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
            const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
            const found = [];
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            for (let node; (node = walker.nextNode()); ) {
                const element = node.parentElement;
                const box = element.getBoundingClientRect();
                if (!node.data.trim() || !box.width || element.closest("script, legend, option")) continue;
                const style = getComputedStyle(element);
                const svg = element.closest("svg");
                const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
                let contrast = null;
                if (!element.closest(".compare, .beside, label:has(:disabled)")) {
                    let behind = element;
                    const opaque = (x) => /^rgb\\(/.test(getComputedStyle(x).backgroundColor);
                    while (behind.parentElement && !opaque(behind)) behind = behind.parentElement;
                    const background = getComputedStyle(behind).backgroundColor;
                    const colors = [svg ? style.fill : style.color, background];
                    const [a, b] = colors.map((c) => light(numbers(c)));
                    contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                }
                const size = parseFloat(style.fontSize) * scale;
                found.push([node.data.trim(), size, contrast, box.left, box.right]);
            }
            return found;
        }"""
    )
    assert len(texts) > 100
    small = [t for t in texts if t[1] < SMALLEST_FONT - 0.5]
    assert small == []
    faint = [t for t in texts if t[2] is not None and t[2] < 4.5]
    assert faint == []
    # nothing but what lies in a table that scrolls sticks out of the window
    tables = page.locator(".scroll").evaluate_all("(all) => all.map((x) => x.innerText).join()")
    outside = [
        t for t in texts if (t[3] < -1 or t[4] > viewport["width"] + 1) and t[0] not in tables
    ]
    assert outside == []
    if viewport is PHONE:
        for control in page.locator("#filter label").all():
            assert control.bounding_box()["height"] >= 24
    assert opened.complaints == []


def test_text_of_the_data_does_nothing(open_report, folder):
    def rename(content):
        content["dataset"] = HOSTILE
        for i, c in enumerate(content["classes"]):
            c["name"] = HOSTILE + str(i)
        for case in content["cases"]:
            case["file_name"] = HOSTILE

    change_json(folder, rename)
    write_report(str(folder))
    opened = open_report(folder, viewport=PHONE)
    assert opened.page.title() == f"Painting orders on {HOSTILE}"
    assert HOSTILE in opened.page.get_by_role("heading", level=1).inner_text()
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_the_policy_stops_what_would_come_in_nevertheless(open_report, written):
    opened = open_report(written)
    opened.page.evaluate(
        """() => {
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.broken = 1'>");
            const image = new Image();
            image.src = "https://example.com/x.png";
        }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.broken") is None
    assert all("Content Security Policy" in text for text in opened.complaints)
    assert len(opened.complaints) >= 2
    assert not [url for url in opened.answered if url.startswith("http")]


def test_without_a_script_the_pictures_are_there(browser, written):
    context = browser.new_context(viewport=WIDE, java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{written}/report.html")
    assert visible_cases(page) == len(read_json(written)["cases"])
    assert not page.locator("#filter").is_visible()
    context.close()
