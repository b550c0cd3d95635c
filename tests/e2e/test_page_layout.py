"""The page on a phone, in the dark, by keyboard alone, and for a screen reader."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser
from chat_page import IDLE, TOOL, ask, reload, set_field, wait_for_answers

WIDEST = (
    "Math.max(document.documentElement.scrollWidth, ...['#log', '#panel section:not([hidden])', '#conversations']"
    ".map(s => { const e = document.querySelector(s); return e?.clientWidth ? e.scrollWidth - e.clientWidth : 0; }))"
)
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
LONG = "donaudampfschifffahrtsgesellschaftskapitän" * 6


def outside(page: Browser) -> list[str]:
    """Controls that stick out of the view to the right or the left."""
    found: list[str] = page.value(
        "[...document.querySelectorAll('button, select, textarea, input, .message, figure')].filter(e => e.offsetParent"
        " && !e.closest('.unseen')).filter(e => { const r = e.getBoundingClientRect();"
        " return r.width && (r.left < -1 || r.right > innerWidth + 1); }).map(e => e.outerHTML.slice(0, 90))"
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_sticks_out(page: Browser, width: int) -> None:
    """Welcome, code, a table, a call of a tool, long words, and both panels."""
    set_field(page, "#tools", json.dumps(TOOL))
    page.look(width, 640)
    page.wait_for(f"{WIDEST} <= {width}")
    assert page.value(WIDEST) <= width and outside(page) == []
    ask(page, "Show me code", 1)
    ask(page, "attack", 2)
    ask(page, "How is the weather? " + LONG, 3)
    assert page.value(WIDEST) <= width and outside(page) == []
    assert page.value("document.querySelector('#send').getBoundingClientRect().bottom") <= 640
    for button in ("#show-side", "#show-engine", "#show-settings"):
        page.click(button)
        page.wait_for("!document.querySelector('#scrim').hidden")
        page.wait_for("document.getAnimations().every(a => a.playState === 'finished')")
        assert page.value(WIDEST) <= width and outside(page) == []
        assert page.value("document.activeElement.closest('.drawer') !== null")
        page.press("Escape")
        page.wait_for("document.querySelector('#scrim').hidden")
        assert page.value("document.activeElement.id") == button[1:]
    # a finger needs room
    small = page.value(
        "[...document.querySelectorAll('#stage button')].filter(e => e.offsetParent && !e.classList.contains('text'))"
        ".map(e => e.getBoundingClientRect()).filter(r => r.width < 24 || r.height < 24).length"
    )
    assert small == 0


def test_light_and_dark(page: Browser) -> None:
    light = page.value(BACKGROUND)
    page.look(scheme="dark")
    dark = page.value(BACKGROUND)
    assert light == "rgb(242, 245, 244)" and dark == "rgb(10, 23, 29)"
    page.click("#theme")
    assert page.value(BACKGROUND) == light
    reload(page)
    assert page.value(BACKGROUND) == light  # what was chosen stays
    page.click("#theme")
    assert page.value(BACKGROUND) == dark
    page.look(scheme="light")
    assert page.value(BACKGROUND) == light  # and follows the system again


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart(page: Browser, scheme: str) -> None:
    """Text has a contrast of 4.5 to what it stands on, marks of 3 (WCAG 2.2, AA)."""
    page.look(scheme=scheme)

    def contrast(one: str, other: str) -> float:
        read = "getComputedStyle(document.documentElement).getPropertyValue('--%s').trim()"
        a, b = sorted(luminance(page.value(read % name)) for name in (one, other))
        return (b + 0.05) / (a + 0.05)

    for ground in ("page", "card", "side", "mine", "code", "accent-soft"):
        assert contrast("ink", ground) >= 7
        assert contrast("soft", ground) >= 4.5, ground
    for text, ground in (
        ("accent", "page"),
        ("accent", "card"),
        ("on-accent", "accent"),
        ("bad", "bad-page"),
        ("bad", "card"),
    ):
        assert contrast(text, ground) >= 4.5, (text, ground)
    for mark in ("heat", "kind-window", "kind-entries", "kind-pending"):
        assert contrast(mark, "card") >= 2.9, mark
    assert contrast("heat", "heat-none") >= 2.9


def test_by_keyboard_alone(page: Browser) -> None:
    focus = "document.activeElement"
    page.value("document.activeElement.blur()")
    page.press("/")
    assert page.value(f"{focus}.id") == "prompt"
    page.type("Show me code")
    page.press("Enter")
    wait_for_answers(page, 1)
    assert page.value(f"{focus}.id") == "prompt"
    seen = walk(page, "Tab", shift=True, steps=12)  # back from the message box into the answer
    assert "Copy the code" in seen and "Write this answer anew" in seen
    page.value("document.querySelector('.user [aria-label=\"Edit this message\"]').focus()")
    page.press("Enter")
    assert page.value(f"{focus}.getAttribute('aria-label')") == "Your message"
    page.press("Escape")
    assert page.value(f"{focus}.getAttribute('aria-label')") == "Edit this message"
    page.press("e")
    page.wait_for("!document.querySelector('#engine').hidden && document.querySelector('#panel').offsetParent")
    page.press("s")
    page.wait_for("!document.querySelector('#settings').hidden")
    page.value("document.querySelector('#tab-settings').focus()")
    page.press("ArrowLeft")
    assert page.value(f"{focus}.id") == "tab-engine"
    page.press("c")
    assert page.value(f"{focus}.id") == "search"
    page.type("n")  # in a box, keys are letters
    assert page.value("document.querySelectorAll('.assistant').length") == 1
    page.value("document.querySelector('#search').value = ''; document.querySelector('#title').tabIndex = -1;"
               " document.querySelector('#log').focus()")  # fmt: skip
    page.press("?")
    page.wait_for("document.querySelector('#help-dialog').open")
    page.value("document.querySelector('#single-keys').click()")
    page.press("Escape")
    page.value("document.querySelector('#log').focus()")
    page.press("n")  # switched off
    assert page.value("document.querySelectorAll('.assistant').length") == 1


def walk(page: Browser, key: str, *, steps: int, shift: bool = False) -> list[str]:
    """Names of what has the focus, one step after the other; each of them can be seen to have it."""
    seen = []
    for _ in range(steps):
        page.press(key, shift=shift)
        name, outline = page.value(
            "[document.activeElement.ariaLabel ?? document.activeElement.textContent.slice(0, 30),"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        seen.append(name)
        assert outline != "none" or page.value("document.activeElement.id") == "prompt", name
    return seen


def nodes(page: Browser) -> Iterator[Any]:
    page.call("Accessibility.enable")
    for node in page.call("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            yield node
    page.call("Accessibility.disable")


def test_every_control_has_a_name(page: Browser) -> None:
    page.click("#show-settings")
    set_field(page, "#tools", json.dumps(TOOL))
    ask(page, "How is the weather?", 1)
    roles = {"button", "textbox", "searchbox", "combobox", "checkbox", "slider", "spinbutton", "tab", "link", "dialog"}
    counted = 0
    for tab in ("#tab-settings", "#tab-engine"):
        page.click(tab)
        for node in nodes(page):
            if node["role"]["value"] in roles:
                counted += 1
                assert node["name"]["value"].strip(), node
    assert counted > 40
    landmarks = {node["role"]["value"] for node in nodes(page)}
    assert {"main", "navigation", "complementary", "log"} <= landmarks
    assert page.value("document.querySelector('.assistant').getAttribute('aria-busy')") == "false"
    assert page.text("#status")  # a screen reader hears that the answer is there


@pytest.mark.slow
def test_motion_can_be_reduced(page: Browser) -> None:
    page.look(calm=True)
    ask(page, "Go on forever")
    page.wait_for("document.querySelector('.answer')?.textContent.length > 10")
    assert page.value("document.getAnimations().length") == 0
    page.press("Escape")
    page.wait_for(IDLE)
