"""The two examples of DeepSeek's articles, end to end with real parts: PDFs, a sandbox, Excel, a mail server, a skill.

The model is a recorded script (`recipes/agents`), and once the bundled one.
"""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from agent_documents import FOUND, HARBOUR, budget_folder, harbour_folder
from full import often
from mail_server import mail_server
from openpyxl import load_workbook

from rorqual.agents import RunSettings, create_run, run_agent
from rorqual.agents.report import state_of
from rorqual.errors import SandboxError
from rorqual.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "agents"
BUDGET_TASK = (
    "Convert all PDFs in my folder to text, extract every paragraph mentioning '2025 budget', format as Excel, send to "
    "my email"
)
KINDS = [
    "container",
    pytest.param("function", marks=pytest.mark.slow),
    pytest.param("microvm", marks=pytest.mark.slow),
    pytest.param("vm", marks=pytest.mark.slow),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def need(kind: Any) -> None:
    """Skip where this machine can run no sandbox of the kind, or takes minutes for it."""
    if kind == "vm" and not often(0, 1):
        pytest.skip("a whole machine, where it is emulated, takes minutes; RORQUAL_TEST_FULL=1 runs it")
    try:
        with Sandbox.create(kind, create_timeout=120) as sandbox:
            if sandbox.info().isolation == "vm-emulated" and not often(0, 1):
                pytest.skip("an emulated machine takes minutes; RORQUAL_TEST_FULL=1 runs it")
    except SandboxError as error:
        pytest.skip(f"no {kind} sandbox here: {error}")


def check_table(data: bytes) -> None:
    """The Excel file holds exactly the paragraphs, as text."""
    book = load_workbook(io.BytesIO(data))
    assert book.sheetnames == ["2025 budget"]
    rows = list(book["2025 budget"].iter_rows(values_only=True))
    assert rows[0] == ("Document", "Paragraph", "Text")
    assert [(row[0], str(row[2])[: len(begin)]) for row, (_, begin) in zip(rows[1:], FOUND, strict=True)] == FOUND
    assert {cell.data_type for row in book["2025 budget"].iter_rows() for cell in row} == {"s", "n"}


@pytest.mark.parametrize("kind", KINDS)
def test_budget_paragraphs_as_excel_by_mail(kind: Any, home: Path, tmp_path: Path) -> None:
    need(kind)
    files = budget_folder(tmp_path / "pdfs")
    with mail_server() as server:
        command = [
            *(sys.executable, "-m", "rorqual", "agent", "run", BUDGET_TASK, "--kind", kind, "--files", str(files)),
            *("--script", str(RECIPES / "budget" / "replies.json"), "--out", str(tmp_path / "out"), "--name", "budget"),
            *("--smtp", server.address, "--mail-to", "ada@example.org", "--json"),
        ]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        [message] = server.inbox
    assert (message["To"], message["Subject"]) == ("ada@example.org", "Paragraphs on the 2025 budget")
    [attached] = message.iter_attachments()
    assert attached.get_filename() == "budget-2025.xlsx"
    data = attached.get_payload(decode=True)
    assert isinstance(data, bytes) and data == (tmp_path / "out" / "budget-2025.xlsx").read_bytes()
    check_table(data)
    texts = sorted(path.name for path in (tmp_path / "out" / "text").iterdir())
    assert texts == ["letter.txt", "menu.txt", "minutes-march.txt"]
    done = json.loads(ended.stdout.splitlines()[-1])
    assert done["ending"] == "done" and "sent that file to you" in done["answer"]
    assert Sandbox.list() == []


class Page(HTMLParser):
    """What the house style speaks of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and data.strip():
            self.texts.setdefault(self.tags[-1], []).append(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pdf_as_html_in_the_house_style(kind: Any, home: Path, tmp_path: Path) -> None:
    need(kind)
    settings = RunSettings(
        "Make an HTML report of harbour.pdf in our house style.",
        script=str(RECIPES / "report" / "replies.json"),
        kind=kind,
        files=str(harbour_folder(tmp_path / "pdfs")),
        out=str(tmp_path / "out"),
        skills=(str(RECIPES / "report" / "skills"),),
    )
    run = create_run(settings, "report")
    result = run_agent(run)
    assert result.files == [tmp_path / "out" / "report.html"]
    text = result.files[0].read_text()
    page = Page(text)
    assert page.texts["h1"] == page.texts["title"] == [HARBOUR[0]]
    assert page.tags.count("h1") == 1 and "script" not in page.tags and "link" not in page.tags
    after_h1 = page.attributes[page.tags.index("h1") + 1]
    assert after_h1 == ("p", {"class": "summary"})
    assert len(re.findall(r"[.!?]( |$)", page.texts["p"][0])) <= 2
    assert page.texts["caption"] and page.texts["td"] == ["412", "96,500", "0"]
    assert page.tags[-1] == "footer" and "harbour.pdf" in page.texts["footer"][0]
    assert "Prepared by an agent" in page.texts["footer"][0]
    assert (RECIPES / "report" / "skills" / "house-report" / "style.css").read_text() in text
    assert state_of(run).closed == "done" and Sandbox.list() == []


@pytest.mark.slow
def test_the_bundled_model_takes_the_same_path(home: Path, tmp_path: Path) -> None:
    """It is too small for such a task, and its answer is not judged: what it wrote is on record, token by token."""
    need("container")
    settings = RunSettings("Say hello.", turn_tokens=24, total_tokens=48, max_turns=2, out=str(tmp_path / "out"))
    run = create_run(settings, "minke")
    first = run_agent(run)
    state = state_of(run)
    assert 0 < state.tokens <= 48 and state.closed == first.answer.ending
    assert run_agent(run).answer == first.answer
