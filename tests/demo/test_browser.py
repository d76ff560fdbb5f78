"""The demo in a browser: `nox -s browser`, or Chromium and Playwright in the environment. Skipped without them.

With `DEMO_SCREENSHOT=docs/pictures/demo.png` it takes the picture of the documentation.
"""

import os
import re
import shutil
from urllib.parse import urlsplit

import pytest
from PIL import Image

from helpers.demo import noted_connections, served
from video_panda_hf import SHIPPED_CLIPS


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
HERE = {"127.0.0.1", "::1", "localhost"}
PATIENCE = 90_000  # milliseconds
# The camera is a drawing of Chromium's own: a green circle.
FLAGS = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")


@pytest.fixture(scope="module")
def asked():
    """A page in a browser, and the addresses that it asked for."""
    addresses = []
    with noted_connections() as hosts, served(max_new_tokens=20) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1180, "height": 800})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(address)
        yield page, addresses
        browser.close()
    assert set(hosts) <= HERE


def upload(page, file) -> None:
    if (clear := page.get_by_label("Clear", exact=True)).count():
        clear.first.click()
    page.locator("input[type=file]").first.set_input_files(str(file))


def ask(page, question: str) -> None:
    box = page.get_by_role("textbox", name="Question", exact=True).first
    box.fill(question)
    box.press("Enter")


def waits_for(page, text: str) -> None:
    playwright.expect(page.get_by_text(text).last).to_be_visible(timeout=PATIENCE)


def test_a_visitor_asks_twice_sees_an_explanation_and_an_error(asked, tmp_path):
    page, addresses = asked
    upload(page, SHIPPED_CLIPS / "red_circle_left.mp4")
    page.locator("video").first.wait_for()
    ask(page, "Which way does it move?")
    waits_for(page, "It moves to the left.")
    ask(page, "What colour is it?")
    waits_for(page, "It is red.")

    page.get_by_role("tab", name="What it looked at").click()
    page.get_by_role("button", name="Explain", exact=True).click()
    explanation = page.locator("#explanation img").first
    explanation.wait_for()
    assert explanation.evaluate("image => image.naturalWidth") > 300
    waits_for(page, "It is red.")
    if screenshot := os.environ.get("DEMO_SCREENSHOT"):
        page.wait_for_timeout(1000)  # the picture has come in
        page.screenshot(path=tmp_path / "page.png")
        Image.open(tmp_path / "page.png").convert("RGB").quantize(64).save(screenshot, optimize=True)

    was_dark = page.evaluate("document.body.classList.contains('dark')")
    page.get_by_role("button", name="Dark or light").click()
    page.wait_for_function("was => document.body.classList.contains('dark') !== was", arg=was_dark)

    (tmp_path / "broken.mp4").write_bytes(b"this is no video" * 99)
    page.get_by_role("tab", name="Conversation").click()
    upload(page, tmp_path / "broken.mp4")
    page.get_by_text("broken.mp4").or_(page.locator("video")).first.wait_for()
    ask(page, "What is this?")
    playwright.expect(page.get_by_text(re.compile("not a video in a known format")).last).to_be_visible(
        timeout=PATIENCE
    )
    assert "Traceback" not in page.content()

    asked_for = [urlsplit(address) for address in addresses]
    outside = {part.geturl() for part in asked_for if part.scheme.startswith("http") and part.hostname not in HERE}
    assert asked_for and not outside


def test_a_visitor_asks_about_what_the_camera_recorded(asked):
    page, _ = asked
    page.reload()
    page.get_by_label("Capture from camera").first.click()
    page.get_by_text("Click to Access Webcam").first.click()
    page.get_by_label("start recording").first.click()
    page.get_by_text("Stop", exact=True).first.wait_for()
    page.wait_for_timeout(4000)  # a recording that is shorter may be empty on a busy machine
    page.get_by_text("Stop", exact=True).first.click()
    page.get_by_label("Clear", exact=True).first.wait_for()  # it has been uploaded
    ask(page, "What colour is it?")
    playwright.expect(page.get_by_test_id("bot").last).to_contain_text("green", timeout=PATIENCE)
