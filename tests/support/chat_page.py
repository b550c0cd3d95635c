"""The page over a scripted model, as the browser's tests use it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from browser import Browser
from live_server import live
from mock_model import ScriptModel, byte_tokenizer

from rorqual.engine import Engine
from rorqual.server import create_app

IDLE = "document.querySelector('#stop').hidden && document.querySelector('#messages .assistant:last-child .figures')"
READY = "document.documentElement?.dataset.ready === ''"
CODE = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nEnjoy 🐋 <b>&amp;</b>"
EVIL = (
    '<img src=x onerror="window.hacked = 1"> <script>window.hacked = 2</script>\n\n'
    "[run](javascript:window.hacked=3) [data](data:text/html,<script>1</script>) ![pic](https://example.com/a.png)\n\n"
    "<iframe src='javascript:window.hacked=4'></iframe> [fine](https://example.com/?q=<b>)\n\n"
    "```html\n<img src=x onerror=window.hacked=5>\n```\n\n| <svg onload=window.hacked=6> | b |\n"
    "| --- | --- |\n| c | d |"
)
CALL = (
    'I will look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n'
    '<｜DSML｜parameter name="{parameter}" string="true">{value}</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
TOOL: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def reply(prompt: str) -> str:
    """What the script answers to the last message."""
    question = prompt.rpartition("<｜User｜>")[2]
    if "<tool_result>" in question:
        answer = f"The tool says {question.partition('<tool_result>')[2].partition('</tool_result>')[0]}."
    elif "weather" in question and "## Tools" in prompt:
        answer = CALL.format(name="get_weather", parameter="city", value="Köln <b>")
    elif "sum" in question and "## Tools" in prompt:
        answer = CALL.format(name="calculate", parameter="expression", value="2 * (3 + 4) ^ 2")
    elif "forever" in question:
        answer = "on and " * 400
    elif "attack" in question:
        answer = EVIL
    else:
        answer = CODE if "code" in question else f"You asked in {prompt.count('<｜User｜>')} turns."
    return f"First I think.</think>{answer}" if prompt.endswith("<think>") else answer


@contextmanager
def scripted_site() -> Iterator[tuple[str, Engine]]:
    """A server of the scripted model: its address and its engine."""
    model = ScriptModel(reply)
    model.step_s = 0.002
    with Engine(model, byte_tokenizer()) as engine, live(create_app(engine, "minke")) as url:
        yield url, engine


def open_fresh(page: Browser, url: str) -> None:
    """The page as a newcomer sees it."""
    page.open("about:blank")  # so that nothing of the page runs while its storage is emptied
    page.call("Storage.clearDataForOrigin", origin=url, storageTypes="all")
    page.errors.clear()
    page.look()
    load(page, url)


def load(page: Browser, url: str) -> None:
    page.open(url)
    page.wait_for(READY)


def reload(page: Browser) -> None:
    page.value("delete document.documentElement.dataset.ready, location.reload()")
    page.wait_for(READY)


def ask(page: Browser, text: str, answers: int | None = None) -> None:
    """Type a question and send it; with `answers`, wait until there are so many."""
    for _ in range(5):  # a page that still draws may move the box from under the mouse; a person clicks again
        page.click("#prompt")
        if page.value("document.activeElement?.id === 'prompt'"):
            break
    page.type(text)
    page.wait_for(f"document.querySelector('#prompt').value.endsWith({json.dumps(text)})")
    page.press("Enter")
    if answers is not None:
        wait_for_answers(page, answers)


def wait_for_answers(page: Browser, count: int) -> None:
    page.wait_for(f"document.querySelectorAll('.assistant').length === {count} && {IDLE}", 60)


def show_engine(page: Browser) -> None:
    """Open the engine view, and wait until it says something: what is below then stays where it is."""
    page.click("#show-engine")
    page.wait_for("document.querySelector('#now dd')")


def set_field(page: Browser, selector: str, value: str) -> None:
    """Give a field a value as if it had been typed."""
    page.value(
        f"(() => {{ const box = document.querySelector({json.dumps(selector)}); box.value = {json.dumps(value)};"
        " for (const kind of ['input', 'change']) box.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


def record_requests(page: Browser) -> None:
    """Keep the bodies that the page sends in `window.sent`."""
    page.value(
        "(() => { window.sent = []; const real = fetch; window.fetch = (path, init) => {"
        " if (init?.body) sent.push(JSON.parse(init.body)); return real(path, init); }; })()"
    )
