"""The page in a real browser, without a network: by keyboard, by class, on a phone, in the dark, without its script."""

import json
import re

import pytest
from browser_support import DESKTOP, PHONE, needs_browser, running_browser, screenshot, show
from report_support import write_history
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from evaluation.compare import find_regressions, group_series
from evaluation.report import ReportData, render_report
from evaluation.viewer import gather_pictures

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of six nights."""
    folder = tmp_path_factory.mktemp("store")
    records = write_history(folder, nights=6)
    links = {record.id: f"records/{record.id}.json" for record in records}
    data = ReportData(
        title="Evaluation of /runs/a",
        created_at="2026-03-07 04:00 UTC",
        summary={"Step": "600"},
        records=records,
        links=links,
        regressions=[found for series in group_series(records) for found in find_regressions(series, 3.0)],
        pictures=gather_pictures(records, lambda path: (folder / path).read_bytes(), lambda r: links[r.id]),
        config_yaml="run: {seed: 0}\n" * 20,
    )
    file = folder / "report.html"
    file.write_text(render_report(data))
    return file


@pytest.fixture(scope="module")
def browser():
    with running_browser() as driver:
        yield driver


@pytest.fixture
def driver(browser, page):
    """The browser with the page on a desktop's screen."""
    show(browser, page)
    return browser


def shown(driver):
    """Captions of the samples that are visible."""
    figures = driver.find_elements(By.CSS_SELECTOR, "[data-viewer] figure")
    return [figure.find_element(By.TAG_NAME, "figcaption").text for figure in figures if figure.is_displayed()]


def events(driver, name):
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [message["params"] for message in messages if message["method"] == name]


def test_the_page_loads_without_errors_and_asks_for_nothing(driver, page):
    asked = [event["request"]["url"] for event in events(driver, "Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert driver.get_log("browser") == []
    assert all(driver.execute_script("return [...document.images].map(i => i.naturalWidth > 0)"))


def test_nights_are_stepped_through_by_keyboard_and_by_buttons(driver):
    assert shown(driver) == ["Step 600, 2026-03-06"], "the newest at first"
    slider = driver.find_element(By.CSS_SELECTOR, "[data-viewer] [type=range]")
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown(driver) == ["Step 500, 2026-03-05"]
    assert slider.get_attribute("aria-valuetext") == "Step 500, 2026-03-05"
    slider.send_keys(Keys.HOME)
    assert shown(driver) == ["Step 100, 2026-03-01"]
    driver.find_element(By.TAG_NAME, "body").send_keys(".")
    assert shown(driver) == ["Step 200, 2026-03-02"]
    earlier, later = driver.find_elements(By.CSS_SELECTOR, "[data-viewer] [data-step]")
    earlier.click()
    assert shown(driver) == ["Step 100, 2026-03-01"] and not earlier.is_enabled() and later.is_enabled()
    driver.find_element(By.CSS_SELECTOR, "[data-viewer] [type=checkbox]").click()
    assert len(shown(driver)) == 6


def test_everything_is_reached_with_the_tab_key(driver):
    reached = set()
    for _ in range(60):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        element = driver.switch_to.active_element
        reached.add(element.get_attribute("type") or element.tag_name)
    assert {"select-one", "range", "button", "checkbox", "radio", "a", "summary"} <= reached


def test_the_class_filter_cuts_every_picture_to_one_row(driver):
    window = driver.find_element(By.CSS_SELECTOR, "[data-viewer] figure:not([hidden]) .window")
    whole = window.size
    select = Select(driver.find_element(By.ID, "class"))
    assert [option.text for option in select.options] == ["all", "circle", "square", "star"]
    select.select_by_visible_text("square")
    cut = window.size
    assert cut["height"] * 2.5 < whole["height"] * cut["width"] / whole["width"]
    parts = (window.find_element(By.TAG_NAME, "img"), window)
    image, frame = (driver.execute_script("return arguments[0].getBoundingClientRect()", part) for part in parts)
    share = (frame["top"] - image["top"]) / image["height"]
    assert share == pytest.approx(66 / 196, abs=0.01), "the second of three rows of 64 pixels and gaps of 2"
    select.select_by_visible_text("all")
    assert window.size == whole


def test_trends_are_shown_over_steps_or_over_nights(driver):
    charts = driver.find_elements(By.CSS_SELECTOR, "#trends [data-axis]")
    assert {chart.get_attribute("data-axis") for chart in charts if chart.is_displayed()} == {"steps"}
    driver.find_element(By.CSS_SELECTOR, "[name=axis][value=nights]").click()
    assert {chart.get_attribute("data-axis") for chart in charts if chart.is_displayed()} == {"nights"}


def test_regressions_are_on_top_and_link_to_their_records(driver):
    alarm = driver.find_element(By.CSS_SELECTOR, ".alarm")
    assert "Distance of samples of runs/a: 140.0" in alarm.text.replace("\N{NO-BREAK SPACE}", " ")
    assert alarm.location["y"] < driver.find_element(By.ID, "distances").location["y"]
    alarm.find_element(By.TAG_NAME, "a").click()
    assert re.search(r"/records/[0-9a-f]{32}\.json$", driver.current_url)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_screen(browser, page, size, dark, tmp_path):
    show(browser, page, size, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    for control in browser.find_elements(By.CSS_SELECTOR, "button, select"):
        assert control.size["height"] >= 44, "a finger hits it"
    screenshot(browser, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_without_its_script_the_page_shows_every_night(browser, page, tmp_path):
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL))
    show(browser, bare)
    assert len(shown(browser)) == 6
    assert not browser.find_element(By.CSS_SELECTOR, "[data-viewer] [type=range]").is_displayed()
