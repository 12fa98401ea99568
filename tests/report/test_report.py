import json
import math
import re
import shutil
import sys
from dataclasses import replace

import pytest
from networks import make_data, make_labelled, make_model

import rankfold
from rankfold.analysis.correction import Check
from rankfold.errors import RankfoldError
from rankfold.record import Record
from rankfold.report.report import facts_of, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def record() -> Record:
    small = rankfold.compress(
        make_model(),
        make_data(),
        latency=0.99,
        epochs=2,
        loss_metric="response",
        test=make_labelled(),
        metric=rankfold.accuracy,
    )
    return rankfold.record_of(small)


def facts_in(page: str):
    (text,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_the_page_holds_all_that_is_remembered(record, tmp_path) -> None:
    path = tmp_path / "report.html"
    origin = {"model": "my.code:make model", "data": "my.code:data"}
    write_report(record, path, title="Mine", origin=origin)
    page = path.read_text(encoding="utf-8")
    facts = facts_in(page)
    assert facts == json.loads(json.dumps(facts_of(record, "Mine", origin)))
    assert facts["command"] == "rankfold compress 'my.code:make model' --data my.code:data"
    assert [layer["name"] for layer in facts["plan"]["layers"]] == [
        layer.name for layer in record.plan.layers
    ]
    assert "<title>Mine</title>" in page
    # Plotly's own code apart, nothing in it is fetched from anywhere.
    ours = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.S)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", ours) and "://" not in ours


def test_text_cannot_leave_its_place(record, tmp_path) -> None:
    evil = "</script><script>alert(1)</script><!-- & \u2028"
    layers = (replace(record.plan.layers[0], reason=evil), *record.plan.layers[1:])
    assert record.outlook is not None
    check = Check("stem", "svd", (8,), 0.1, math.inf)
    outlook = replace(record.outlook, checks=(check,))
    marked = replace(record, plan=replace(record.plan, layers=layers), outlook=outlook)
    path = tmp_path / "report.html"
    write_report(marked, path, title=evil, origin={"model": evil})
    page = path.read_text(encoding="utf-8")
    facts = facts_in(page)
    assert facts["title"] == evil and facts["plan"]["layers"][0]["reason"] == evil
    assert facts["outlook"]["checks"][0]["measured"] is None
    assert "alert(1)</script>" not in page


def test_what_cannot_be_written_is_said(record, tmp_path, monkeypatch) -> None:
    with pytest.raises(RankfoldError, match="cannot be written"):
        write_report(record, tmp_path / "nowhere" / "report.html")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(RankfoldError, match=r"pip install 'rankfold\[report\]'"):
        write_report(record, tmp_path / "report.html")


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, and without the network."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


def text_of(browser, name: str) -> str:
    return browser.find_element("id", name).text


def press(browser, name: str, key: str, times: int = 1) -> None:
    for _ in range(times):
        browser.find_element("id", name).send_keys(key)


def test_in_a_browser_the_slider_moves_the_numbers(browser, record, tmp_path) -> None:
    from selenium.webdriver.common.keys import Keys

    write_report(record, tmp_path / "report.html", title="Mine")
    browser.get((tmp_path / "report.html").as_uri())
    assert record.outlook is not None and record.comparison is not None
    assert text_of(browser, "title") == "Mine"
    assert text_of(browser, "budget-value").endswith("(this plan)")
    plots = browser.find_elements("css selector", ".plot svg.main-svg")
    assert len(plots) >= 4
    # Of the keyboard alone: to the smallest budget of latency.
    press(browser, "budget", Keys.HOME)
    smallest = record.outlook.curves["latency"][0]
    share = smallest.cost.latency_ms / record.plan.before.latency_ms
    assert text_of(browser, "budget-value") == f"{100 * share:.0f} % of time"
    factorized = sum(
        layer.options[place].method is not None
        for layer, place in zip(record.outlook.layers, smallest.options, strict=True)
    )
    assert f"{factorized} of {len(record.plan.layers)}" in text_of(browser, "point")
    assert "--latency 0." in text_of(browser, "command")
    rows = browser.find_elements("css selector", "#layers tbody tr")
    assert len(rows) == len(record.plan.layers)
    for row, layer, place in zip(rows, record.outlook.layers, smallest.options, strict=True):
        assert layer.name in row.text and (layer.options[place].method or "dense") in row.text
    # Another cost, and back.
    browser.find_element("css selector", "input[value=params]").click()
    press(browser, "budget", Keys.END)
    assert "100 % of parameters" in text_of(browser, "budget-value")
    assert "--params 1" in text_of(browser, "command")
    browser.find_element("id", "back").click()
    assert text_of(browser, "budget-value").endswith("(this plan)")
    # A layer is looked at, the theme changed; nothing complained.
    browser.find_elements("css selector", "#layers button")[1].click()
    assert text_of(browser, "layer-title") == record.plan.layers[1].name
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.find_element("id", "theme").click()
    after = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert before != after
    assert browser.get_log("browser") == []


def test_in_a_browser_a_plan_alone_is_a_page_too(browser, tmp_path) -> None:
    plan = rankfold.analyze(make_model(), make_data(), metric="weight").plan(macs=0.5)
    write_report(Record(plan, "0" * 64), tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    assert "not measured" in text_of(browser, "comparison-note")
    assert not browser.find_element("id", "explorer").is_displayed()
    assert not browser.find_element("id", "recovery").is_displayed()
    assert browser.get_log("browser") == []
