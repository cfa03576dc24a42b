"""The app in a real browser, as a visitor uses it; skipped where Chromium or its driver is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_genmodels.app.server import Server

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
N = 784

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver; tests/browser.sh install"),
]

Visit = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def visit(server: Server, tmp_path: Path) -> Visit:
    """Opens the page in a browser of its own, and looks that the page complained of nothing in the end."""
    count = iter(range(9))

    @contextmanager
    def opened(width: int = 1200, height: int = 1600) -> Iterator[Any]:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        folder = f"--user-data-dir={tmp_path / str(next(count))}"
        for flag in (*FLAGS, folder, f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        if width < 500:
            metrics = {"width": width, "height": height, "pixelRatio": 2.0, "touch": True}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        try:
            browser.get(server.url)
            until(browser, lambda: browser.execute_script("return document.body.dataset.ready") == "yes")
            yield browser
            assert browser.get_log("browser") == []
            asked = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
            assert all(address.startswith((server.url, "data:")) for address in asked)
        finally:
            browser.quit()

    return opened


def until(browser: Any, holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    return WebDriverWait(browser, seconds, 0.1).until(lambda _: holds())


def find(browser: Any, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def press(browser: Any, text: str, within: str = "#complete") -> None:
    find(browser, within).find_element(By.XPATH, f".//button[text()='{text}']").click()


def sheet(browser: Any, pad: str = "complete") -> tuple[str, str]:
    """Image and given pixels of what is drawn."""
    canvas = find(browser, f"[data-pad={pad}] > canvas")
    return canvas.get_attribute("data-image"), canvas.get_attribute("data-observed")


def stroke(browser: Any, points: list[tuple[float, float]], pad: str = "complete", kind: str = "mouse") -> None:
    """Draws a line through points (x, y), in pixels of the image."""
    canvas = find(browser, f"[data-pad={pad}] > canvas")
    browser.execute_script("arguments[0].scrollIntoView()", canvas)
    actions = ActionChains(browser, duration=50)
    if kind == "touch":
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        actions.w3c_actions = ActionBuilder(browser, mouse=PointerInput("touch", "finger"), duration=50)
    scale = canvas.size["width"] / 28
    pointer = actions.w3c_actions.pointer_action
    for index, (x, y) in enumerate(points):
        pointer.move_to(canvas, round((x - 14) * scale), round((y - 14) * scale))
        if not index:
            pointer.pointer_down()
    pointer.pointer_up()
    actions.perform()


def choose(browser: Any, *names: str) -> None:
    for box in browser.find_elements(By.CSS_SELECTOR, "#complete-models input"):
        if box.is_selected() != (box.get_attribute("value") in names):
            box.click()


def guesses(browser: Any, name: str) -> list[str]:
    images = browser.find_elements(By.CSS_SELECTOR, f"[data-model='{name}'] .grid canvas")
    return [image.get_attribute("data-pixels") for image in images]


def assert_completed(browser: Any, name: str, count: int = 4) -> None:
    image, observed = sheet(browser)
    drawn = until(browser, lambda: guesses(browser, name))
    assert len(drawn) == count
    for one in drawn:
        assert len(one) == N
        assert all(a == b for a, b, given in zip(one, image, observed, strict=True) if given == "1")
        assert any(a == "1" for a, given in zip(one, observed, strict=True) if given == "0")


def test_a_digit_is_drawn_and_completed(visit: Visit) -> None:
    with visit() as browser:
        press(browser, "clear")
        assert set(sheet(browser)[0]) == {"0"}
        stroke(browser, [(8, 6), (19, 6), (13, 22)])
        press(browser, "hide the bottom half")
        image, observed = sheet(browser)
        assert observed == "1" * 392 + "0" * 392
        assert 15 < image.count("1") < 90
        choose(browser, "nade.static_v1", "eonade.static_v2", "vae.static_v1")
        find(browser, "#complete-go").click()
        for name in ("nade.static_v1", "eonade.static_v2", "vae.static_v1"):
            assert_completed(browser, name)
        assert "exact for this mask" in find(browser, "[data-model='nade.static_v1'] .badge").text
        before = guesses(browser, "nade.static_v1")
        press(browser, "hide the top half")
        find(browser, "#complete-go").click()
        until(browser, lambda: guesses(browser, "nade.static_v1") not in ([], before))
        assert "too late" in find(browser, "[data-model='nade.static_v1'] .badge").text


def test_brushes_undo_and_reload(visit: Visit) -> None:
    with visit() as browser:
        press(browser, "clear")
        stroke(browser, [(5, 5), (20, 5)])
        inked = sheet(browser)
        press(browser, "hide")
        stroke(browser, [(10, 3), (10, 8)])
        hidden = sheet(browser)
        assert hidden[1].count("0") > 20
        assert hidden[0].count("1") < inked[0].count("1")
        press(browser, "paper")
        stroke(browser, [(18, 2), (18, 9)])
        assert sheet(browser)[0].count("1") < hidden[0].count("1")
        press(browser, "undo")
        assert sheet(browser) == hidden
        browser.refresh()
        until(browser, lambda: browser.execute_script("return document.body.dataset.ready") == "yes")
        assert sheet(browser) == hidden
        press(browser, "hide nothing")
        assert sheet(browser) == (inked[0], "1" * N)


def test_nothing_hidden_is_said_in_one_sentence(visit: Visit) -> None:
    with visit() as browser:
        press(browser, "hide nothing")
        choose(browser, "nade.static_v1")
        find(browser, "#complete-go").click()
        failed = until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".failed"))
        assert "hide some with the brush" in failed[0].text
        assert any("400" in entry["message"] for entry in browser.get_log("browser"))  # the browser's own line


def test_noise_is_less_likely_in_every_model(visit: Visit) -> None:
    with visit() as browser:
        find(browser, "#tab-score").click()

        def nats() -> list[float]:
            find(browser, "#score-go").click()
            rows = until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#score-results tbody tr"))
            found = until(
                browser,
                lambda: [value for row in rows if (value := row.get_attribute("data-nats"))][len(rows) - 1 :] and rows,
                180,
            )
            return [float(row.get_attribute("data-nats")) for row in found]

        digit = nats()
        press(browser, "noise", "#score")
        noisy = nats()
        assert len(digit) >= 18
        assert all(more > less + 20 for less, more in zip(digit, noisy, strict=True))
        assert len(browser.find_elements(By.CSS_SELECTOR, "#score-results canvas")) == len(digit)


def test_samples_pixel_by_pixel_and_between_digits(visit: Visit) -> None:
    with visit() as browser:
        find(browser, "#tab-sample").click()
        Select(find(browser, "#sample-model")).select_by_value("nade.static_v1")
        find(browser, "#sample-go").click()
        until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "#sample-results canvas")) == 16)
        browser.execute_script("arguments[0].value = 40", find(browser, "#speed"))
        find(browser, "#watch-go").click()
        until(browser, lambda: len(find(browser, "#watch-image").get_attribute("data-pixels") or "") == N)
        Select(find(browser, "#sample-model")).select_by_value("vae.static_v1")
        assert not find(browser, "#watch").is_displayed()
        find(browser, "#codes-go").click()
        plane = until(browser, lambda: (found := find(browser, "#plane")).is_displayed() and found)
        first = find(browser, "#plane-point").get_attribute("data-pixels")
        ActionChains(browser).move_to_element(plane).perform()
        assert find(browser, "#plane-point").get_attribute("data-pixels") != first
        before = until(browser, lambda: find(browser, "#slider-image").get_attribute("data-pixels"))
        slider = find(browser, "#sliders input")
        browser.execute_script("arguments[0].value = 3; arguments[0].dispatchEvent(new Event('input'))", slider)
        until(browser, lambda: find(browser, "#slider-image").get_attribute("data-pixels") != before)


def test_two_visitors_at_once(visit: Visit) -> None:
    with visit() as one, visit() as two:
        for browser, points in ((one, [(8, 6), (19, 6)]), (two, [(14, 3), (14, 12)])):
            press(browser, "clear")
            stroke(browser, points)
            press(browser, "hide the bottom half")
            choose(browser, "pixelcnn.static_v2", "nade.static_v1")
        for browser in (one, two):
            find(browser, "#complete-go").click()
        for browser in (two, one):
            for name in ("pixelcnn.static_v2", "nade.static_v1"):
                assert_completed(browser, name)


def test_a_finger_on_a_phone(visit: Visit) -> None:
    with visit(390, 844) as browser:
        press(browser, "clear")
        stroke(browser, [(8, 6), (19, 6), (13, 13)], kind="touch")
        assert sheet(browser)[0].count("1") > 15
        press(browser, "hide the bottom half")
        choose(browser, "nade.static_v1")
        find(browser, "#complete-go").click()
        assert_completed(browser, "nade.static_v1")
        for tab in ("score", "sample", "complete"):
            find(browser, f"#tab-{tab}").click()
            if tab == "score":
                find(browser, "#score-go").click()
                until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#score-results canvas"))
            if tab == "sample":
                find(browser, "#codes-go").click()
                until(browser, lambda: find(browser, "#plane").is_displayed())
            wide, seen = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide <= seen == 390
