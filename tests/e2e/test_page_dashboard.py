"""The dashboard in a browser: what it draws of a real gateway's journal and of results, on a phone, with keys."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browser import Browser
from live_server import live
from mock_upstream import MockUpstream, says

from rorqual.referee import Options, Policy
from rorqual.referee.audit import Audit
from rorqual.server.accounts import Accounts
from rorqual.server.dashboard import Dashboard
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_wire import Upstream
from rorqual.server.operations import Operations

READY = "document.documentElement?.dataset.ready === ''"
RESULT = {"suite": "facts", "model": {"id": "<b>minke</b>"}, "n": 24, "valid": True, "headline": {"HR": 0.25},
          "intervals": {"HR": [0.1, 0.4]}}  # fmt: skip
LATER = {**RESULT, "headline": {"HR": 0.5, "OI": 12.0}}
ARM = {"wrong": {"value": 0.5}, "latency_ms": {"p50": 12.0}}
TRIAL = {"suite": "trial", "model": "m", "n": 10, "valid": False, "headline": {"HR": 0.0, "RET": 1.0, "OI": 3.0},
         "before": ARM, "after": {**ARM, "wrong": {"value": 0.125}}}  # fmt: skip
KEY = {"authorization": "Bearer key-a"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("dashboard")
    for name, result in (("one", RESULT), ("again", LATER), ("two", TRIAL)):
        (folder / "evals" / name).mkdir(parents=True)
        (folder / "evals" / name / "result.json").write_text(json.dumps(result))
    mock = MockUpstream([says("It is 20."), says("17 + 3 = 21"), says("17 + 3 = 20"), says("Fine.")])
    operations = Operations(accounts=Accounts(given_keys={"ann": "key-a"}))
    with live(mock.app()) as upstream:  # type: ignore[arg-type]
        gateway = Gateway(
            Upstream(upstream, "sk-up"), Options("enforce", Policy()), audit=Audit(folder / "journal"),
            dashboard=Dashboard(folder / "evals", folder / "journal"), operations=operations,
        )  # fmt: skip
        with live(create_gateway(gateway)) as url:
            for _ in range(4):
                body = {"model": "m", "messages": [{"role": "user", "content": "What is seventeen and three?"}]}
                httpx2.post(f"{url}/v1/chat/completions", json=body, headers=KEY).raise_for_status()
            yield url


@pytest.fixture
def dashboard(browser: Browser, site: str) -> Iterator[Browser]:
    browser.open("about:blank")
    browser.call("Storage.clearDataForOrigin", origin=site, storageTypes="all")
    browser.errors.clear()
    browser.look()
    browser.open(f"{site}/dashboard")
    browser.wait_for(READY)
    browser.wait_for("!document.querySelector('#ask-key').hidden")  # the numbers ask for a key, the page does not
    assert "API key" in browser.text("#verdicts-trouble")
    browser.click("#key")
    browser.type("key-a")
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('#charts figure').length === 4")
    browser.wait_for("document.querySelectorAll('#evals table').length === 3")
    yield browser
    assert [error for error in browser.errors if "status of 401" not in error] == []


def tiles(page: Browser) -> dict[str, str]:
    found: dict[str, str] = page.value(
        "Object.fromEntries([...document.querySelectorAll('#totals div')]"
        ".map(e => [e.querySelector('dt').textContent, e.querySelector('dd').textContent]))"
    )
    return found


def test_what_it_says_is_what_the_server_counts(dashboard: Browser, site: str) -> None:
    total: Any = httpx2.get(f"{site}/v1/referee/stats", headers=KEY).json()["total"]
    assert total["verdicts"] == {"pass": 3, "repaired": 1}
    told = tiles(dashboard)
    assert told["answers judged"] == "4" and told["passed"] == "75.0 %" and told["of faulty ones repaired"] == "100.0 %"
    assert told["further rounds"] == "1"
    label = dashboard.value("document.querySelector('#charts svg[role=img]').getAttribute('aria-label')")
    assert label == "Verdicts. 3 pass, 1 repaired"
    # the bars of the newest hour are as high as their counts
    heights: dict[str, float] = dashboard.value(
        "Object.fromEntries([...document.querySelectorAll('#charts figure:first-child .chart rect')]"
        ".map(e => [e.getAttribute('class'), Number(e.getAttribute('height'))]))"
    )
    assert heights["c0"] == pytest.approx(3 * heights["c1"])
    assert "arith_wrong" in dashboard.text("#reasons")


def test_evals_and_text_that_is_no_markup(dashboard: Browser) -> None:
    told = dashboard.text("#evals")
    line = "document.querySelector('#evals polyline').getAttribute('points').split(' ').length"
    assert dashboard.value(line) == 2 and dashboard.value("document.querySelectorAll('#evals polyline').length") == 1
    assert "<b>minke</b>" in told and "0.25 (0.1–0.4)" in told and "50.0 % → 12.5 %" in told and "not valid" in told


def test_lines_are_lines(dashboard: Browser) -> None:
    """A class gives a bar its filling and a line its colour alone."""
    told = dashboard.value(
        "(() => { const e = document.createElementNS('http://www.w3.org/2000/svg', 'polyline');"
        " e.setAttribute('class', 'c2'); document.querySelector('.chart').append(e);"
        " const { fill, stroke } = getComputedStyle(e); e.remove(); return [fill, stroke]; })()"
    )
    assert told[0] == "none" and told[1] != "none"


def test_by_day_is_another_span(dashboard: Browser) -> None:
    dashboard.value(
        "(() => { const e = document.querySelector('#by'); e.value = 'day';"
        " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    dashboard.wait_for("document.querySelectorAll('#charts figure:first-child tbody tr').length === 30")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert today in dashboard.value("document.querySelector('#charts tbody tr:last-child').textContent")


@pytest.mark.parametrize("width", [320, 768])
def test_on_a_phone_and_for_a_screen_reader(dashboard: Browser, width: int, tmp_path: Path) -> None:
    dashboard.look(width, 640)
    dashboard.wait_for(f"document.documentElement.scrollWidth <= {width}")
    size = "parseFloat(getComputedStyle(document.querySelector('.chart text')).fontSize)"
    dashboard.wait_for(  # the words of the charts are not squeezed with them, once they are drawn for this width
        "(() => { const e = document.querySelector('.chart'); return e.getBoundingClientRect().width"
        f" / e.viewBox.baseVal.width * {size}; }})() >= 11"
    )
    assert dashboard.value("[...document.querySelectorAll('svg.chart')].every(e => e.getAttribute('aria-label'))")
    assert dashboard.value("[...document.querySelectorAll('input, select')].every(e => e.labels.length)")
    assert dashboard.value(
        "[...document.querySelectorAll('table')].every(e => e.caption && e.querySelector('th[scope]'))"
    )
    assert dashboard.value("[...document.querySelectorAll('h1, h2, h3')].map(e => e.tagName[1]).join('')") == "12233"
