"""
The page in a real browser. Skipped where there is no Chromium or no playwright to drive it. With
OANET_REQUIRE_BROWSER=1, as in continuous integration, that is a failure.
"""

import os
import shutil

import pytest

from oanet_d2.report import write_report
from tests.report.conftest import HOSTILE, change_json, make_hostile, read_json

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        reason = "playwright or a browser of Chromium's kind is not installed"
        (pytest.fail if os.environ.get("OANET_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser):
    """Opens the report of a folder. Nothing may complain or ask the network."""
    complaints, requests = [], []

    def open_report(folder, viewport):
        page = browser.new_context(viewport=viewport, offline=True).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{write_report(str(folder))}")
        page.wait_for_function("[...document.images].every((image) => image.complete)")
        return page

    yield open_report
    assert complaints == []
    assert all(url.startswith("data:") for url in requests[1:])


def test_pictures_and_their_slider(open_report, folder):
    page = open_report(folder, WIDE)
    sizes = page.evaluate("[...document.images].map((x) => [x.naturalWidth, x.naturalHeight])")
    assert sizes == [[480, 480]] * 4 * sum(map(len, read_json(folder)["cases"].values()))
    compare = page.locator(".compare").first
    compare.scroll_into_view_if_needed()
    slider = compare.get_by_role("slider")
    assert "score" in slider.get_attribute("aria-label")
    half = compare.screenshot()
    box = compare.bounding_box()
    y = box["y"] + 0.6 * box["height"]
    page.mouse.move(box["x"] + 0.5 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.98 * box["width"], y, steps=5)
    page.mouse.up()
    assert int(slider.input_value()) >= 90
    first = compare.screenshot()
    slider.focus()
    page.keyboard.press("Home")
    insets = [
        compare.locator(name).evaluate("(x) => getComputedStyle(x).clipPath")
        for name in (".before", ".after")
    ]
    assert insets == ["inset(0px 100% 0px 0px)", "inset(0px 0px 0px 0%)"]
    assert len({half, first, compare.screenshot()}) == 3
    assert all(x.input_value() == "50" for x in page.locator(".compare input").all()[1:])


def test_hostile_names_on_a_phone(open_report, folder):
    change_json(folder, make_hostile)
    page = open_report(folder, PHONE)
    assert page.title() == f"Painting orders on {HOSTILE}"
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
