"""Long answers and long conversations leave the page quick."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from browser import Browser
from chat_page import IDLE, ask, open_fresh, reload
from live_server import live
from mock_model import ScriptModel, byte_tokenizer
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rorqual.engine import Engine
from rorqual.server import create_app

pytestmark = pytest.mark.slow

TOKENS = 10_000
PARAGRAPH = "A sentence of **some** words about `krill`, and then another one. " * 3
KINDS = {
    "prose": f"{PARAGRAPH}\n\n",
    "one paragraph": PARAGRAPH,
    "code": "    total = total + value  # a line of code\n",
    "list": "- an item of a list that never ends\n",
}


class LongAnswers:
    """Answers every chat with `TOKENS` pieces, twenty at a time, as a quick model would; the question says of what."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == "/v1/chat/completions":
            body = b""
            while True:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            kind = json.loads(body)["messages"][-1]["content"]
            await StreamingResponse(self._lines(kind), media_type="text/event-stream")(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _lines(self, kind: str) -> AsyncIterator[str]:
        text = "```python\n" if kind == "code" else ""
        text += KINDS[kind] * (5 * TOKENS // len(KINDS[kind])) if kind in KINDS else f"You said {kind}."
        pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
        for at in range(0, len(pieces), 20):
            yield "".join(map(line, pieces[at : at + 20]))
            await asyncio.sleep(0.008)
        yield line("", "stop") + "data: [DONE]\n\n"


def line(text: str, reason: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n"


@pytest.fixture(scope="module")
def long_url() -> Iterator[str]:
    with Engine(ScriptModel(lambda prompt: "Hi"), byte_tokenizer()) as engine:
        app: Any = LongAnswers(create_app(engine, "minke"))
        with live(app) as url:
            yield url


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_answer_of_ten_thousand_tokens(browser: Browser, long_url: str, kind: str) -> None:
    """While it comes in some seconds, the page never stands still for long: it could scroll, and stop.

    A page that draws all of a long answer for each of its pieces pauses at each of them; a machine with other work
    pauses once in a while. So nearly all pauses have to be short, and the longest within a second.
    """
    open_fresh(browser, long_url)
    browser.value(
        "window.gaps = []; let last = performance.now();"
        " (function tick() { const now = performance.now(); gaps.push(now - last); last = now;"
        " if (!window.over) setTimeout(tick, 0); })()"
    )
    ask(browser, kind)
    browser.wait_for(IDLE, 60)
    browser.value("window.over = true")
    gaps = sorted(browser.value("gaps"))
    length = len(browser.text(".answer"))
    longest, nearly_all = gaps[-1], gaps[-1 - len(gaps) // 100]
    print(f"{kind}: {length} characters, longest pause {longest:.0f} ms, 99 % within {nearly_all:.0f} ms")
    assert length > 4 * TOKENS
    assert longest < 1000 and nearly_all < 150
    assert browser.errors == []


def test_a_conversation_of_five_hundred_messages(browser: Browser, long_url: str) -> None:
    page = browser
    open_fresh(page, long_url)
    page.value(
        "import('/static/js/store.js').then(async m => { const s = new m.Store(); await s.open(); const messages = [];"
        f" for (let i = 0; i < 250; i += 1) messages.push({{role: 'user', content: 'Question ' + i}},"
        f" {{role: 'assistant', content: 'Answer ' + i + '\\n\\n' + {json.dumps(PARAGRAPH)}.repeat(3)"
        " + '\\n\\n```py\\nx = 1\\n```\\n\\n- a\\n- b', reasoning_content: 'hm', figures: {}, state: 'done'});"
        " s.put({id: 'long', title: 'Long', created: 1, updated: 1, settings: {}, messages}); await s.write();"
        " location.hash = 'long'; })"
    )
    reload(page)
    assert page.value("document.querySelectorAll('.message').length") == 500
    took = page.value("performance.getEntriesByType('navigation')[0].duration, performance.now()")
    opened = page.value(
        "new Promise(async done => { document.querySelector('#new-chat').click(); const began = performance.now();"
        " document.querySelector('#conversations .open').click();"
        " requestAnimationFrame(() => setTimeout(() => done(performance.now() - began))); })"
    )
    print(f"500 messages: {opened:.0f} ms from the click to the first frame, {took:.0f} ms from loading the page")
    assert opened < 10_000  # no hang; how quick it is, is printed
    assert page.value("document.querySelector('#log').scrollTop") > 10_000  # at its end
    last = page.value("document.querySelector('.message:last-child').getBoundingClientRect().bottom")
    assert last < 800
    ask(page, "Hello", 251)
    assert page.text(".answer") == "You said Hello."
    assert page.errors == []
