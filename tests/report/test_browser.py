"""
The page in a real browser. Skipped where there is no Chromium or no playwright to drive it. With
OANET_REQUIRE_BROWSER=1, as in continuous integration, that is a failure.
"""

import os
import shutil

import pytest

from oanet_d2.report import write_report
from tests.report.conftest import HOSTILE, make_hostile, read_json

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def open_report():
    """Opens the report of a folder. Nothing may complain or ask the network."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if os.environ.get("OANET_REQUIRE_BROWSER") != "1":
        pytest.importorskip("playwright")
        if path is None:
            pytest.skip(f"none of {', '.join(NAMES)} is installed")
    from playwright.sync_api import sync_playwright

    complaints, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])

        def open_report(folder, width):
            size = {"width": width, "height": 900}
            page = browser.new_context(viewport=size, offline=True).new_page()
            for event in ("console", "pageerror", "dialog"):
                page.on(event, lambda complaint: complaints.append(complaint))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(f"file://{write_report(str(folder))}")
            page.wait_for_function("[...document.images].every((image) => image.complete)")
            return page

        yield open_report
    assert complaints == []
    assert all(url.startswith("data:") for url in requests[1:])


def test_pictures_and_their_slider(open_report, folder):
    page = open_report(folder, width=1280)
    sizes = page.evaluate("[...document.images].map((x) => [x.naturalWidth, x.naturalHeight])")
    assert sizes == [[480, 480]] * 4 * sum(map(len, read_json(folder)["cases"].values()))
    compare = page.locator(".compare").first
    compare.scroll_into_view_if_needed()
    slider = compare.get_by_role("slider")
    half = compare.screenshot()
    x, y, width, height = compare.bounding_box().values()
    page.mouse.move(x + 0.5 * width, y + 0.6 * height)
    page.mouse.down()
    page.mouse.move(x + 0.98 * width, y + 0.6 * height, steps=5)
    page.mouse.up()
    assert int(slider.input_value()) >= 90
    first = compare.screenshot()
    slider.focus()
    page.keyboard.press("Home")
    assert len({half, first, compare.screenshot()}) == 3
    assert all(x.input_value() == "50" for x in page.locator(".compare input").all()[1:])


def test_hostile_names_on_a_phone(open_report, folder):
    make_hostile(folder)
    page = open_report(folder, width=360)
    assert page.title() == f"Painting orders on {HOSTILE}"
    assert page.evaluate("document.documentElement.scrollWidth") == 360
