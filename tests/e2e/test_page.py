"""The page in a real browser: ask, read the streamed answer, unfold the thinking, stop."""

import time
from collections.abc import Iterator

import pytest
from browser import Browser, find_chromium
from live_server import live
from mock_model import ScriptModel, byte_tokenizer

from rorqual.engine import Engine
from rorqual.server import create_app

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (Debian: apt-get install chromium)"),
]

CODE = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nEnjoy 🐋 <b>&amp;</b>"


def reply(prompt: str) -> str:
    question = prompt.rpartition("<｜User｜>")[2]
    if "forever" in question:
        answer = "on and " * 400
    else:
        answer = CODE if "code" in question else f"You asked in {prompt.count('<｜User｜>')} turns."
    return f"First I think.</think>{answer}" if prompt.endswith("<think>") else answer


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model = ScriptModel(reply)
    model.step_s = 0.004
    with Engine(model, byte_tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with live(create_app(engine, "minke")) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, url: str) -> Browser:
    """The page as a newcomer sees it."""
    browser.errors.clear()
    browser.open(url)
    browser.value("sessionStorage.clear()")
    browser.open(f"{url}/?fresh")
    browser.wait_for("document.querySelector('#model').value === 'minke'")
    return browser


IDLE = "document.querySelector('#stop').hidden"


def ask(page: Browser, text: str) -> None:
    page.click("#prompt")
    page.type(text)
    page.press("Enter", 13)


def test_a_question_is_answered_and_the_conversation_goes_on(page: Browser) -> None:
    assert page.value("document.querySelector('#welcome').offsetHeight") > 0
    ask(page, "Show me code")
    page.wait_for("document.querySelector('.reasoning').textContent.startsWith('First')")
    assert page.value("document.querySelector('.thinking').open")  # shown while it thinks
    page.wait_for("document.querySelector('.answer').textContent.length > 5")
    assert not page.value(IDLE)  # it came in pieces, not at the end
    page.wait_for(IDLE)
    assert page.text(".message.user .text") == "Show me code"
    assert page.text(".answer pre") == "def add(a, b):\n    return a + b"
    assert page.text(".answer .text:last-child") == "Enjoy 🐋 <b>&amp;</b>"  # text, never markup
    figures = page.text(".figures")
    assert "tokens/s" in figures and "first token after" in figures

    assert not page.value("document.querySelector('.thinking').open")
    page.click(".thinking summary")
    page.wait_for("document.querySelector('.thinking').open")
    assert page.text(".reasoning") == "First I think."

    page.value("document.querySelector('#effort').value = 'off'")
    page.click("#prompt")
    page.type("second")
    page.press("Enter", 13, shift=True)
    page.type("line")
    page.press("Enter", 13)
    page.wait_for(f"{IDLE} && document.querySelectorAll('.answer').length === 2")
    assert page.text(".message.user .text") == "second\nline"
    assert page.text(".answer") == "You asked in 2 turns."
    assert page.value("[...document.querySelectorAll('.thinking')].at(-1).hidden")

    page.value("location.reload()")  # the conversation survives
    page.wait_for("document.querySelectorAll('.answer').length === 2 && document.querySelector('#model').value")
    assert page.text(".answer") == "You asked in 2 turns."
    page.click("#new-chat")
    page.wait_for("document.querySelectorAll('.message').length === 0")
    assert page.value("document.querySelector('#welcome').offsetHeight") > 0
    assert page.errors == []


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_cancels_the_request(page: Browser, engine: Engine, how: str) -> None:
    ask(page, "Go on forever")
    page.wait_for("document.querySelector('.answer')?.textContent.length > 20")
    if how == "button":
        page.click("#stop")
    else:
        page.press("Escape", 27)
    page.wait_for(IDLE)
    assert "stopped" in page.text(".figures")
    length = len(page.text(".answer"))
    deadline = time.monotonic() + 5
    while engine.occupancy() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.occupancy() == (0, 0)  # the server stopped too
    assert len(page.text(".answer")) == length < 2800
    ask(page, "And now?")
    page.wait_for(f"{IDLE} && document.querySelectorAll('.answer').length === 2")
    assert page.text(".answer") == "You asked in 2 turns."


def test_a_refusal_is_shown_and_the_question_kept(page: Browser) -> None:
    page.value("document.querySelector('#model').add(new Option('gone', 'gone', true, true))")
    ask(page, "Hello?")
    page.wait_for("document.querySelector('.error')")
    assert "minke, but you passed gone" in page.text(".error")
    assert page.value("document.querySelector('#prompt').value") == "Hello?"
    assert page.value("document.querySelectorAll('.message').length") == 0  # it was not said, so it is not shown
    page.value("document.querySelector('#model').value = 'minke'")
    page.click("#send")
    page.wait_for(f"{IDLE} && document.querySelector('.answer')")
    assert page.text(".answer") == "You asked in 1 turns."


def test_it_fits_a_phone_and_the_dark(page: Browser) -> None:
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", features=dark)
    ask(page, "Show me code")
    page.wait_for(f"{IDLE} && document.querySelector('.figures')?.textContent.includes('tokens/s')")
    assert page.value("document.documentElement.scrollWidth") <= 360
    send = page.value("JSON.stringify(document.querySelector('#send').getBoundingClientRect())")
    assert '"width":0' not in send
    assert page.value("document.querySelector('#send').getBoundingClientRect().bottom") <= 640
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(16, 24, 29)"
