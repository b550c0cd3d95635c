"""The page in a browser, for the tests that open it; and which test failed, for what several of them share."""

from collections.abc import Generator, Iterator

import pytest
from browser import Browser, find_chromium
from chat_page import open_fresh, scripted_site
from failures import note_failure

from rorqual.engine import Engine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    note_failure(item, report)
    return report


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found (Debian: apt-get install chromium)")
    with Browser(executable, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="session")
def scripted() -> Iterator[tuple[str, Engine]]:
    with scripted_site() as site:
        yield site


@pytest.fixture
def url(scripted: tuple[str, Engine]) -> str:
    return scripted[0]


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Browser]:
    """The scripted model's page as a newcomer sees it; afterwards its scripts must have raised nothing."""
    open_fresh(browser, url)
    yield browser
    refused = "Failed to load resource: the server responded with a status of 400"  # how a browser notes a refusal
    assert [error for error in browser.errors if not error.startswith(refused)] == []
