"""The pictures of the page in docs/img, taken with Minke in a real browser: `python scripts/screenshots.py [FOLDER]`.

Needs Chromium and what the tests need. Greedy answers, so the words are the same each time; the times are not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browser import Browser, find_chromium  # noqa: E402
from chat_page import ask, load, open_fresh, set_field, show_engine  # noqa: E402
from live_server import live  # noqa: E402

import rorqual  # noqa: E402
from rorqual.engine import CacheSettings, EngineSettings  # noqa: E402
from rorqual.server import create_app  # noqa: E402

CODES = (
    "kogre kite, tromfos engine, fazergoth forest, skope candle, zohus saddle, kaxpum forest, medegrom bucket, "
    "bavu apple, sondda lemon, tutrin drawer, wavidral carpet, hejand eagle, tresvas bridge, kriparoth lantern, "
    "bulorn bucket, drujuzus umbrella, bigex pepper, lori ladder, grobetrim ladder, piwige valley, bipa rocket, "
    "digrix needle, kala ribbon, mirak island, sofatro valley, hudor bucket"
)
NOTES = "\n".join("The code of {} is {}.".format(*one.split()) for one in CODES.split(", "))
TOOL: Any = {
    "name": "open_window",
    "description": "Open the window.",
    "parameters": {
        "type": "object",
        "properties": {"room": {"type": "string"}, "minutes": {"type": "integer"}},
        "required": ["room", "minutes"],
    },
}


def main(folder: Path) -> None:
    """Take all of them."""
    executable = find_chromium()
    if executable is None:
        sys.exit("No Chromium was found, so no picture can be taken. Install one (Debian: apt-get install chromium).")
    model, tokenizer = rorqual.load("minke")
    with (
        tempfile.TemporaryDirectory() as profile,
        EngineSettings(cache=CacheSettings(), speculate=True).open(model, tokenizer) as engine,
        live(create_app(engine, "minke")) as url,
        Browser(executable, Path(profile)) as page,
    ):
        open_fresh(page, url)
        set_field(page, "#temperature", "0")
        talk(page)
        shoot(page, folder / "page.png", 1280, 800)
        shoot(page, folder / "page-phone.png", 390, 780)
        look_up(page)
        shoot(page, folder / "page-engine.png", 1280, 860, "dark", heat=True)
        use_a_tool(page)
        shoot(page, folder / "page-tools.png", 1280, 800)
        page.value("document.querySelector('#reset').click()")
        load(page, f"{url}/?welcome")
        page.look(390, 780, scheme="dark")
        page.wait_for("document.querySelector('#scrim').hidden")
        shoot(page, folder / "page-phone-dark.png", 390, 780, "dark")


def talk(page: Browser) -> None:
    """Two questions; the second one's thinking unfolded."""
    ask(page, "Hello! Who are you?", 1)
    ask(page, "Write a function that returns the sum of the even numbers in xs.", 2)
    page.click(".thinking summary")
    page.value("document.querySelector('#new-chat').blur()")


def look_up(page: Browser) -> None:
    """A long note and a question about it, with the heat map of its answer."""
    page.look()
    page.click("#new-chat")
    ask(page, f"{NOTES}\n\nWhat is the code of drujuzus?", 1)
    show_engine(page)
    page.click("#last-picks")
    page.wait_for("!document.querySelector('#heat').hidden")
    page.click(".segments button:last-child")


def use_a_tool(page: Browser) -> None:
    """A call that waits for its result, which is typed but not given yet."""
    page.look()
    page.click("#new-chat")
    page.click("#show-settings")
    set_field(page, "#tools", json.dumps(TOOL))
    ask(page, 'Please open the window with room "kitchen" and minutes 15.', 1)
    page.click(".give textarea")
    page.type("The window is open.")


def point(page: Browser) -> None:
    """Move the pointer over the heat map to where the answer is written, and to what it was read from."""
    find = "(() => { const r = document.querySelector('.map canvas').getBoundingClientRect(); return [%s]; })()"
    x, top, height = page.value(find % "r.x, r.y, r.height")
    width = page.value(find % "r.width")[0]
    steps = [part / 200 for part in range(200)]
    rows = [(0.0, part) for part in steps]
    y = hover(page, x, top, width, height, rows, "document.querySelector('.cell q')?.textContent.includes('umb')")[1]
    cells = [(part, y) for part in steps]
    hover(page, x, top, width, height, cells, "document.querySelectorAll('.cell q')[1]?.textContent.includes('umb')")


def hover(
    page: Browser, x: float, y: float, width: float, height: float, places: list[tuple[float, float]], until: str
) -> tuple[float, float]:
    """Move the pointer through places of a box until something is true; the place where it was."""
    for across, down in places:
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + width * across + 1, y=y + height * down + 1)
        if page.value(until):
            return across, down
    raise RuntimeError(f"nowhere: {until}")


def shoot(page: Browser, path: Path, width: int, height: int, scheme: str = "light", *, heat: bool = False) -> None:
    """A picture of the page as it is, once nothing moves; heat: with a cell of the map under the pointer."""
    page.look(width, height, scheme=scheme, calm=True)
    page.value("new Promise(done => setTimeout(done, 1200))")  # the engine view asks again meanwhile
    page.value("document.querySelector('#log').scrollTop = 1e9, 1")
    if heat:
        page.value("document.querySelector('#heat-box').scrollIntoView()")
        point(page)
    page.screenshot(path)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "img")
