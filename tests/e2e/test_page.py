"""Talking on the page, in a real browser: thinking, tools, stopping, mistakes, and what a reload keeps."""

import json
import time
from typing import Any

import pytest
from browser import Browser
from chat_page import CODE, IDLE, TOOL, ask, record_requests, reload, set_field, wait_for_answers

from rorqual.engine import Engine

ANSWERS = "document.querySelectorAll('.assistant').length"


def test_a_question_is_answered_and_a_reload_keeps_it(page: Browser, scripted: tuple[str, Engine]) -> None:
    thought, answer = scripted[1].model.hold("First I"), scripted[1].model.hold("First I think.</think>Here it")
    assert page.value("document.querySelector('#welcome').offsetHeight") > 0
    ask(page, "Show me code")
    page.wait_for("document.querySelector('.reasoning').textContent.startsWith('First')")
    assert page.value("document.querySelector('.thinking').open")  # shown while it thinks
    thought.set()
    page.wait_for("document.querySelector('.answer').textContent.length > 5")
    assert not page.value(IDLE)  # it came in pieces, not at the end
    answer.set()
    wait_for_answers(page, 1)
    assert page.text(".user .text") == "Show me code"
    assert page.text(".answer pre code") == "def add(a, b):\n    return a + b"
    assert page.text(".answer figcaption span") == "python"
    assert page.text(".answer p:last-child") == "Enjoy 🐋 <b>&amp;</b>"  # text, never markup
    figures = page.text(".figures")
    for words in (" in · ", "% cached · ", " out · ", " thinking · ", "tokens/s", "first after"):
        assert words in figures

    assert not page.value("document.querySelector('.thinking').open")
    page.click(".thinking summary")
    page.wait_for("document.querySelector('.thinking').open")
    assert page.text(".reasoning") == "First I think."

    set_field(page, "#effort", "off")
    page.click("#prompt")
    page.type("second")
    page.press("Enter", shift=True)
    page.type("line")
    page.press("Enter")
    wait_for_answers(page, 2)
    assert page.text(".user .text") == "second\nline"
    assert page.text(".answer") == "You asked in 2 turns."
    assert page.value("[...document.querySelectorAll('.thinking')].at(-1).hidden")

    reload(page)
    assert page.value(ANSWERS) == 2
    assert page.text(".answer") == "You asked in 2 turns."
    assert page.value("document.querySelector('.answer pre code').textContent") == "def add(a, b):\n    return a + b"
    assert page.value("document.querySelector('#effort').value") == "off"
    ask(page, "Third", 3)
    assert page.text(".answer") == "You asked in 3 turns."  # it knows what was said before the reload


@pytest.mark.slow
def test_conversations_are_listed_searched_renamed_deleted_and_moved(page: Browser) -> None:
    ask(page, "About herring", 1)
    page.click("#new-chat")
    page.wait_for(f"{ANSWERS} === 0")
    ask(page, "Of krill and code", 1)
    assert page.value("[...document.querySelectorAll('#conversations .open')].map(e => e.textContent)") == [
        "Of krill and code",
        "About herring",
    ]
    set_field(page, "#search", "def add")  # in the text of an answer
    assert page.text("#conversations .open") == "Of krill and code"
    set_field(page, "#search", "porpoise")
    assert "Nothing holds these words" in page.text("#conversations")
    set_field(page, "#search", "")

    page.value("document.querySelector('[aria-label=\"Rename “About herring”\"]').click()")
    page.type("Fish")
    page.press("Enter")
    assert "Fish" in page.text("#conversations")
    exported = page.value(
        "import('/static/js/store.js').then(async m => { const s = new m.Store(); await s.open();"
        " return JSON.stringify({conversations: s.list()}); })"
    )
    page.value("[...document.querySelectorAll('#conversations .open')].find(e => e.textContent === 'Fish').click()")
    page.wait_for("document.querySelector('#title').textContent === 'Fish'")
    page.value("document.querySelector('[aria-label=\"Delete “Fish”\"]').click()")
    page.wait_for("document.querySelector('#title').textContent === 'New conversation'")
    assert "Fish" not in page.text("#conversations")
    page.click("#toast button")  # undo
    page.wait_for("document.querySelector('#title').textContent === 'Fish'")
    assert page.text(".user .text") == "About herring"

    read = (
        "import('/static/js/store.js').then(m => { try { return m.readExport(%s).map(c => [c.title, c.messages.length,"
        " c.messages[0].content]); } catch (e) { return e.message; } })"
    )
    found = page.value(read % json.dumps(exported))
    assert sorted(found) == [["Fish", 2, "About herring"], ["Of krill and code", 2, "Of krill and code"]]
    strange = {"title": 5, "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": {"a": 1}}]}
    assert (
        page.value(read % json.dumps(json.dumps(strange)))
        == "The file holds no conversation. Choose one that this page exported."
    )
    assert "is not JSON" in page.value(read % json.dumps("nonsense"))
    reload(page)
    assert page.text("#title") == "Fish"


@pytest.mark.parametrize("how", ["button", pytest.param("escape", marks=pytest.mark.slow)])
def test_stopping_cancels_the_request(page: Browser, scripted: tuple[str, Engine], how: str) -> None:
    engine = scripted[1]
    ask(page, "Go on forever")
    page.wait_for("document.querySelector('.answer')?.textContent.length > 20")
    if how == "button":
        page.click("#stop")
    else:
        page.press("Escape")
    page.wait_for(IDLE)
    assert "stopped" in page.text(".figures")
    length = len(page.text(".answer"))
    deadline = time.monotonic() + 5
    while engine.occupancy() != (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.occupancy() == (0, 0)  # the server stopped too
    assert len(page.text(".answer")) == length < 2800
    ask(page, "And now?", 2)
    assert page.text(".answer") == "You asked in 2 turns."


@pytest.mark.slow
def test_a_reload_in_the_middle_keeps_what_had_come(page: Browser) -> None:
    ask(page, "Go on forever")
    page.wait_for("document.querySelector('.answer')?.textContent.length > 40")
    reload(page)
    assert page.text(".answer").startswith("on and on and on")
    assert "stopped" in page.text(".figures")
    assert page.value("document.querySelector('#stop').hidden")


def test_refusals_say_what_to_do_and_can_be_tried_again(page: Browser) -> None:
    page.value(
        "window.real = fetch, window.fetch = (p, init) => real(p, {...init, body: init.body.replace('minke', 'gone')})"
    )
    ask(page, "Hello?")
    page.wait_for("!document.querySelector('#trouble').hidden")
    assert "minke, but you passed gone" in page.text("#trouble")
    assert page.value("document.querySelectorAll('.message').length") == 1  # the question stays, to be tried again
    page.value("window.fetch = real, 1")
    page.click("#trouble button")
    wait_for_answers(page, 1)
    assert page.text(".answer") == "You asked in 1 turns."
    assert page.value("document.querySelector('#trouble').hidden")


@pytest.mark.slow
def test_messages_are_edited_and_answers_written_anew(page: Browser) -> None:
    ask(page, "one", 1)
    ask(page, "two", 2)
    record_requests(page)
    page.value("document.querySelector('.user [aria-label=\"Edit this message\"]').click()")
    page.value("document.querySelector('.editing textarea').select()")
    page.type("Show me code")
    page.press("Enter")
    wait_for_answers(page, 1)
    assert page.text(".answer pre code") in CODE
    assert [one["content"] for one in page.value("sent[0].messages")] == ["Show me code"]
    page.click("#toast button")  # undo
    page.wait_for(f"{ANSWERS} === 2")
    assert page.text(".user .text") == "two"
    page.value("[...document.querySelectorAll('[aria-label=\"Write this answer anew\"]')].at(-1).click()")
    page.wait_for("sent.length === 2")
    wait_for_answers(page, 2)
    assert [one["role"] for one in page.value("sent[1].messages")] == ["user", "assistant", "user"]
    reload(page)
    assert page.value("[...document.querySelectorAll('.user .text')].map(e => e.textContent)") == ["one", "two"]


def test_a_tool_is_called_its_result_given_and_the_answer_goes_on(page: Browser) -> None:
    page.click("#show-settings")
    set_field(page, "#tools", json.dumps(TOOL))
    assert page.text("#marks") == "1 tool"
    ask(page, "How is the weather?")
    page.wait_for("document.querySelector('.call .arguments')?.textContent.length > 3")
    assert page.text(".call .name") == "get_weather"
    wait_for_answers(page, 1)
    assert json.loads(page.text(".call .arguments")) == {"city": "Köln <b>"}
    assert "waits for its result" in page.text(".call .note")
    page.click(".give textarea")
    page.type("rain & <i>wind</i>")
    page.press("Enter")
    wait_for_answers(page, 2)
    assert page.text(".call .result") == "rain & <i>wind</i>"
    assert page.text(".answer") == "The tool says rain & <i>wind</i>."
    reload(page)
    assert page.text(".call .result") == "rain & <i>wind</i>"
    ask(page, "Thanks", 3)

    set_field(page, "#tools", "[{}]")
    assert 'needs a "name"' in page.text("#tools-error")
    set_field(page, "#tools", '{"name": "calculate"}')
    assert "one of the page's own tools" in page.text("#tools-error")


@pytest.mark.slow
def test_its_own_tool_answers_by_itself(page: Browser) -> None:
    page.click("#show-settings")
    page.click("#own-tools input[value=calculate]")
    ask(page, "What is the sum?", 2)
    assert page.text(".call .result") == "98"
    assert page.text(".answer") == "The tool says 98."
    page.click("#run-own")  # and only when somebody says so
    ask(page, "What is the sum?", 3)
    page.wait_for("document.querySelectorAll('.give textarea').length")
    page.click("#prompt")
    page.type("Never mind")
    page.press("Enter")
    wait_for_answers(page, 4)
    assert page.text(".call .result") == "No result was given."


@pytest.mark.slow
def test_the_calculator_knows_its_arithmetic_and_nothing_else(page: Browser) -> None:
    ask_it = (
        "import('/static/js/calculator.js').then(m => %s.map(x => "
        "{ try { return m.calculate(x); } catch (e) { return null; } }))"
    )
    right: dict[str, Any] = {
        "1 + 2 * 3": 7, "2 ^ 3 ^ 2": 512, "-2 ^ 2": -4, "(1 + 2) * -3": -9, "10 % 4": 2, "sqrt(16) + 1e3": 1004,
        "2 ** -1": 0.5, ".5 * 4": 2,
    }  # fmt: skip
    assert page.value(ask_it % json.dumps(list(right))) == list(right.values())
    wrong = ["", "1 +", "alert(1)", "constructor", "this", "(" * 5000, "1 2", "x => 1", "__proto__(1)", "sqrt", "1..2"]
    assert page.value(ask_it % json.dumps(wrong)) == [None] * len(wrong)


@pytest.mark.slow
def test_parameters_reach_the_server(page: Browser) -> None:
    page.click("#show-settings")
    record_requests(page)
    given = {"#system": "Be brief.", "#temperature": "0.75", "#top-p": "0.5", "#max-tokens": "30", "#seed": "7"}
    for selector, value in given.items():
        set_field(page, selector, value)
    set_field(page, "#effort", "max")
    ask(page, "Hello", 1)
    sent = page.value("sent[0]")
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = {"temperature": 0.75, "top_p": 0.5, "max_tokens": 30, "seed": 7, "reasoning_effort": "max"}
    assert {name: sent[name] for name in expected} == expected
    assert "cut off at the limit" in page.text(".figures")
    page.click("#json")
    ask(page, "Hello")
    page.wait_for("sent.length === 2")
    assert page.value("sent[1].response_format") == {"type": "json_object"}
    page.press("Escape")
    page.wait_for("document.querySelector('#stop').hidden")
    set_field(page, "#seed", "-5")  # no seed: it is marked, and the last one stays
    assert page.value("document.querySelector('#seed').getAttribute('aria-invalid')") == "true"
    assert page.text("#marks") == "system prompt · JSON"
    page.click("#new-chat")
    assert page.value("document.querySelector('#system').value") == "Be brief."  # a new one begins with the last
    page.click("#reset")
    assert page.value("document.querySelector('#system').value") == ""
