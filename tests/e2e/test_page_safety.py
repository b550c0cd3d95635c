"""The page trusts nothing that a model writes, and asks for a key where the server wants one."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from browser import Browser
from chat_page import EVIL, ask, load, open_fresh, reload, wait_for_answers
from live_server import live
from mock_model import ScriptModel, byte_tokenizer

from rorqual.engine import Engine
from rorqual.server import create_app
from rorqual.server.accounts import Accounts, Tariff
from rorqual.server.aliases import PRO
from rorqual.server.operations import Operations

SCHEMES = "[...document.querySelectorAll('.answer a')].map(a => new URL(a.href).protocol)"
DRAW = (
    "import('/static/js/markdown.js').then(m => { const box = document.createElement('div');"
    " const drawn = new m.Drawn(box); %s; return box.%s; })"
)


def test_what_a_model_writes_stays_text(page: Browser) -> None:
    ask(page, "attack", 1)
    reload(page)  # the stored one is not trusted either
    assert page.value("window.hacked") is None
    assert (
        page.value("document.querySelectorAll('.answer :is(img, script, iframe, svg[onload], [onerror])').length") == 0
    )
    text = page.value("document.querySelector('.answer').innerText")
    for part in (
        '<img src=x onerror="window.hacked = 1">',
        "<script>",
        "[run](javascript:window.hacked=3)",
        "[data](data:",
    ):
        assert part in text
    assert set(page.value(SCHEMES)) == {"https:"}
    assert page.value("[...document.querySelectorAll('.answer a')].every(a => a.rel.includes('noopener'))")
    assert page.text(".answer th") == "b"
    page.value("for (const a of document.querySelectorAll('.answer a')) a.removeAttribute('href')")
    page.value("document.querySelectorAll('.answer *').forEach(e => e.click?.())")
    assert page.value("window.hacked") is None


def draw(page: Browser, text: str, what: str = "innerHTML") -> Any:
    return page.value(DRAW % (f"drawn.update({json.dumps(text)})", what))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a **b** *c* `d` ~~e~~ __f__",
            "<p>a <strong>b</strong> <em>c</em> <code>d</code> <del>e</del> <strong>f</strong></p>",
        ),
        ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ("# T\ntext\n\n---", "<h3>T</h3><p>text</p><hr>"),
        ("- a\n- b\n  - c\n\n3. x\n4. y", "<ul><li>a</li><li><p>b</p><ul><li>c</li></ul></li></ul>"
         '<ol start="3"><li>x</li><li>y</li></ol>'),
        ("> q\n> r", "<blockquote>q\nr</blockquote>"),
        (r"\*a\* \<b>", r"<p>*a* \&lt;b&gt;</p>"),
        ("[x](https://a.example/b) <https://c.example>", None),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_markdown(page: Browser, text: str, expected: str | None) -> None:
    found = draw(page, text)
    if expected is None:
        assert found.count("<a ") == 2 and 'rel="noopener noreferrer nofollow"' in found
    else:
        assert found == expected


@pytest.mark.slow
def test_text_that_grows_is_drawn_as_if_at_once(page: Browser) -> None:
    """Whatever pieces it comes in, the result is that of the whole text."""
    whole = (
        f"Intro **bold\n\n- one\n- two\n\n  more\n\n{EVIL}\n\n1. a\n2. b\n\n> q\n\n```py\nx = 1\n\ny\n```\nend `code"
    )
    for step in (1, 3, 17):
        loop = f"for (let i = 0; i <= t.length + {step}; i += {step}) drawn.update(t.slice(0, i))"
        grow = f"const t = {json.dumps(whole)}; {loop}"
        assert page.value(DRAW % (grow, "innerHTML")) == draw(page, whole)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["*", "[", "`", "_a", "**a ", "[a](", "> ", "- ", "|-", "![", "http://", "~~", "\\"])
def test_no_text_takes_long(page: Browser, unit: str) -> None:
    """Marks that open and never close cost no more than time in proportion to the text."""
    took = page.value(
        "import('/static/js/markdown.js').then(m => { const d = new m.Drawn(document.createElement('div'));"
        f" const began = performance.now(); d.update({json.dumps(unit)}.repeat(20000));"
        " return performance.now() - began; })"
    )
    assert took < 3000


@contextmanager
def keyed_site() -> Iterator[str]:
    operations = Operations(accounts=Accounts(given_keys={"me": "secret"}, tariff=Tariff(like=PRO)))
    with (
        Engine(ScriptModel(lambda prompt: "x</think>Hi"), byte_tokenizer()) as engine,
        live(create_app(engine, "minke", operations=operations)) as url,
    ):
        yield url


@pytest.mark.slow
def test_a_server_with_keys_is_given_one(browser: Browser) -> None:
    with keyed_site() as url:
        open_fresh(browser, url)
        browser.wait_for("document.querySelector('#key-dialog').open")
        browser.value("document.querySelector('#key').focus()")
        browser.type("secret")
        browser.press("Enter")
        browser.wait_for("document.querySelector('#model').value === 'minke'")
        ask(browser, "Hello", 1)
        assert browser.text(".answer") == "Hi"
        assert re.search(r"· \$0\.0\d+", browser.text(".figures")) and "$0.0" in browser.text("#totals")  # what it cost
        assert browser.value("localStorage.getItem('rorqual.key')") is None  # not kept unless asked for
        load(browser, f"{url}/?again")
        browser.wait_for("document.querySelector('#model').value === 'minke'")
        browser.value("sessionStorage.clear()")
        ask(browser, "Again")
        browser.wait_for("document.querySelector('#key-dialog').open")
        assert browser.text("#trouble p").startswith("Authentication Fails: no API key was sent")
        browser.value("document.querySelector('#key').focus()")
        browser.type("secret")
        browser.press("Enter")
        wait_for_answers(browser, 1)
        browser.errors.clear()  # the browser notes a refused request as an error
