"""The engine view on the page: what runs, memory by kind, and the heat map of picks; Minke's are real."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser
from chat_page import IDLE, ask, open_fresh, reload, set_field, show_engine
from live_server import live

from rorqual import load
from rorqual.engine import CacheSettings, Engine, EngineSettings
from rorqual.server import create_app

NOTES = (
    "Mira keeps the harbour at Vell. Her sister Tala lives in Brandt and paints boats. In the spring of the long "
    "rain the harbour master counted forty boats. The key of the boathouse is 7413. In summer the ferry runs twice a "
    "day, at eight and at five, unless the wind is in the north. The school bell is made from a ship's bell that "
    "nobody claimed. "
)


def test_what_runs_is_seen_while_it_runs(page: Browser, scripted: tuple[str, Engine]) -> None:
    page.press("Escape")
    show_engine(page)
    assert page.value("!document.querySelector('#no-requests').hidden")
    ask(page, "Go on forever")
    page.wait_for("document.querySelector('#requests .answering')")
    assert "tokens written" in page.text("#requests li")
    assert page.value("document.querySelector('#now dd').textContent") == "1 / 8"
    page.press("Escape")
    page.wait_for(IDLE)
    page.wait_for("document.querySelectorAll('#requests li').length === 0")
    assert re.search(r"Last \d+ steps", page.text("#steps-note"))
    assert page.value("document.querySelector('#cache').hidden")  # the scripted model has none
    page.click("#last-picks")  # and no indexer
    page.wait_for("document.querySelector('#heat-note').textContent.includes('no lightning indexer')")


@pytest.fixture(scope="module")
def minke_url() -> Iterator[str]:
    model, tokenizer = load("minke")
    with (
        EngineSettings(cache=CacheSettings(), speculate=True).open(model, tokenizer) as engine,
        live(create_app(engine, "minke")) as url,
    ):
        yield url


@pytest.fixture
def minke(browser: Browser, minke_url: str) -> Iterator[Browser]:
    open_fresh(browser, minke_url)
    set_field(browser, "#temperature", "0")
    yield browser
    assert browser.errors == []


@pytest.mark.slow
def test_minkes_memory_and_heat_map(minke: Browser) -> None:
    page = minke
    show_engine(page)
    ask(page, f"{NOTES}\n\nWhat is the key of the boathouse?", 1)
    page.wait_for("document.querySelector('#kept-bars .legend')")
    kinds = page.value("[...document.querySelectorAll('#kept-bars dt')].map(e => e.textContent)")
    assert kinds == ["Entries", "Index keys", "Checkpoints"]
    assert page.value("[...document.querySelectorAll('.layer')].map(e => e.textContent)") == [
        "window", "window", "CSA", "HCA", "CSA", "HCA",
    ]  # fmt: skip
    page.value("document.querySelector('.assistant [aria-label=\"Show what the indexer picked\"]').click()")
    page.wait_for("!document.querySelector('#heat').hidden")
    assert page.value("[...document.querySelectorAll('.segments button')].map(e => e.textContent)") == [
        *("Layer 2", "Layer 4"),
        *("Picked", "Dense attention"),
    ]
    assert "the indexer of layer 2 picks up to 32" in page.text("#heat .hint")
    assert NOTES[:40] in page.text(".context")
    colours = count_colours(page)
    assert len(colours) >= 3  # nothing there yet, seen and left, picked
    page.value("[...document.querySelectorAll('.segments button')].find(e => e.textContent === 'Layer 4').click()")
    page.wait_for("document.querySelector('#heat .hint').textContent.includes('layer 4')")
    assert "layer 4" in page.text("#heat .hint")
    assert count_colours(page) != colours
    page.value("document.querySelector('.map canvas').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.press(key)
    assert re.search(r"Writing .+, (picked|left out) .+ tokens 8–11$", page.text(".cell"))
    assert page.value("document.querySelector('.context .chosen').dataset.block") == "2"
    page.value("document.querySelectorAll('.context span')[5].dispatchEvent(new Event('pointerover', {bubbles: true}))")
    assert page.text(".cell").endswith("tokens 20–23")
    tints = set(
        page.value("[...document.querySelectorAll('.context span')].map(e => e.style.getPropertyValue('--share'))")
    )
    assert tints == {"0%", "70%"}  # one row: a block is one entry here, picked or not
    # a reload knows the answer's id still
    reload(page)
    show_engine(page)
    page.click("#last-picks")
    page.wait_for("!document.querySelector('#heat').hidden")


def count_colours(page: Browser) -> Any:
    """Pixels of the heat map by colour."""
    found: dict[str, int] = page.value(
        "(() => { const c = document.querySelector('.map canvas'), out = {};"
        " const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " for (let i = 0; i < data.length; i += 4)"
        " { const k = data.slice(i, i + 4).join(); out[k] = (out[k] ?? 0) + 1; }"
        " return out; })()"
    )
    return found


@pytest.mark.slow
def test_the_cache_hit_of_a_second_question_is_shown(minke: Browser) -> None:
    page = minke
    ask(page, f"Read this. {NOTES}\n\nWho paints boats?", 1)
    assert " 0 % cached" in page.text(".figures")
    ask(page, "And where?", 2)
    share = re.search(r"(\d+) % cached", page.text(".figures"))
    assert share is not None and int(share[1]) > 40
    page.click(".why summary")
    assert "prompt tokens came from the store" in page.text(".why")
    show_engine(page)
    page.wait_for("document.querySelector('#reasons dt')")
    hits = page.value("document.querySelectorAll('#cache-figures dd')[1].textContent")
    assert int(hits.split(" / ")[0]) >= 1


@pytest.mark.slow
def test_a_short_question_says_that_there_was_no_choice(minke: Browser) -> None:
    ask(minke, "Hi", 1)
    minke.press("Escape")
    show_engine(minke)
    minke.click("#last-picks")
    minke.wait_for("!document.querySelector('#heat').hidden")
    assert "it took all of them" in minke.text("#heat .hint")
