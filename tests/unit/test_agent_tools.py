"""Tools, skills, MCP servers and the toolkit, each by itself."""

import asyncio
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from agent_documents import write_pdf
from local_sandbox import Commands, Maker
from mail_server import mail_server
from openpyxl import load_workbook

from rorqual.agents.courier import Server
from rorqual.agents.errors import CallFailed, InfraFailed
from rorqual.agents.skills import find_skills, listing, read_skill
from rorqual.agents.toolkit import build_toolkit
from rorqual.agents.tools import Outcome, Tool, ToolBox, ToolContext, standard_tools
from rorqual.agents.tools.mail import mail_tool
from rorqual.agents.tools.mcp import McpTools, read_servers
from rorqual.agents.tools.skill import skill_tool
from rorqual.errors import ConfigError, SandboxError

RECIPES = Path(__file__).parents[2] / "recipes" / "agents"


class Guest:
    """The toolkit's program, run in a folder as in a sandbox."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kit = build_toolkit()
        (folder / kit.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / kit.path).write_bytes(kit.data)
        self._program = kit.path

    def run(self, tool: str, **arguments: Any) -> tuple[int, str]:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", self._program, tool], cwd=self.folder, input=json.dumps(arguments),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return ended.returncode, (ended.stdout if ended.returncode == 0 else ended.stderr).strip()


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_files_read_write_edit_list(guest: Guest) -> None:
    assert guest.run("write_file", path="a/b.txt", content="one\ntwo\nthree\n") == (0, "wrote a/b.txt: 14 characters")
    assert guest.run("read_file", path="a/b.txt", offset=2, limit=1) == (0, "two")
    assert guest.run("edit_file", path="a/b.txt", old="two", new="2") == (0, "replaced 1 time in a/b.txt")
    assert guest.run("edit_file", path="a/b.txt", old="e", new="E")[1].endswith(
        "3 times in a/b.txt; give more of it, or set all"
    )
    assert guest.run("edit_file", path="a/b.txt", old="nine", new="9")[0] == 1
    assert guest.run("list_files") == (0, "a/b.txt  12 bytes")
    assert guest.run("read_file", path="nowhere")[1].startswith("FileNotFoundError")


def test_pdfs_one_of_them_broken(guest: Guest) -> None:
    write_pdf(guest.folder / "in" / "good.pdf", ["First paragraph of it.", "Second, with a number: 7."])
    (guest.folder / "in" / "bad.pdf").write_bytes(b"%PDF-1.7\n1 0 obj << /Type /Catalog /Pages 1 0 R >>\nendobj\n")
    code, text = guest.run("pdf_to_text", path="in", out="out")
    assert code == 0
    assert "in/bad.pdf: cannot be read" in text and "in/good.pdf -> out/good.txt: 1 pages" in text
    assert (guest.folder / "out" / "good.txt").read_text() == "First paragraph of it.\n\nSecond, with a number: 7.\n"
    assert guest.run("pdf_to_text", path="in/bad.pdf")[0] == 1
    assert guest.run("pdf_to_text", path="*.pdf") == (1, "no PDF at *.pdf")


def test_a_spreadsheet_holds_text_as_text(guest: Guest) -> None:
    rows = [{"Name": "=HYPERLINK(1)", "Count": 3}, {"Name": "bell \x07 end", "Count": None}, ["@x", {"a": 1}]]
    (guest.folder / "rows.json").write_text(json.dumps(rows))
    code, text = guest.run("write_spreadsheet", path="o/t.xlsx", rows_file="rows.json", sheet="a/b: c")
    assert (code, text) == (0, "wrote o/t.xlsx: sheet 'ab c', 3 rows, 2 columns")
    page = load_workbook(guest.folder / "o" / "t.xlsx")["ab c"]
    assert [cell.value for cell in page["A"]] == ["Name", "=HYPERLINK(1)", "bell  end", "@x"]
    assert {cell.data_type for cell in page["A"]} == {"s"} and page["B2"].value == 3 and page["A1"].font.bold
    first = (guest.folder / "o" / "t.xlsx").read_bytes()
    guest.run("write_spreadsheet", path="o/t.xlsx", rows_file="rows.json", sheet="a/b: c")
    assert (guest.folder / "o" / "t.xlsx").read_bytes() == first
    code, text = guest.run("read_spreadsheet", path="o/t.xlsx", limit=2)
    assert text.splitlines()[1:] == ['["Name", "Count"]', '["=HYPERLINK(1)", 3]', "... (only 2 rows shown)"]
    assert guest.run("write_spreadsheet", path="t.xlsx", rows="x")[0] == 1
    assert guest.run("read_spreadsheet", path="rows.json")[0] == 1


def test_the_toolkit_is_the_same_file_each_time_and_small() -> None:
    kit = build_toolkit()
    build_toolkit.cache_clear()
    assert build_toolkit() == kit and len(kit.data) < 2 << 20
    names = {name.split("/")[0] for name in zipfile.ZipFile(__import__("io").BytesIO(kit.data)).namelist()}
    assert names == {"__main__.py", "pypdf", "openpyxl", "et_xmlfile"}


def context(tmp_path: Path, files: dict[str, bytes] | None = None) -> ToolContext:
    """A context whose sandbox holds these files."""

    def read_bytes(_: Any, path: str, limit: int) -> bytes:
        if path not in (files or {}):
            raise SandboxError(f"{path} is not there")
        return (files or {})[path]

    written: dict[str, bytes] = {}
    environment: Any = SimpleNamespace(
        read_bytes=read_bytes, put=lambda _, path, data: written.setdefault(path, data), written=written
    )
    return ToolContext("ab" * 16, 0, "rerun", environment, tmp_path / "outbox", 1e9)


def test_a_mail_on_file_needs_its_attachments_no_more(tmp_path: Path) -> None:
    """Its result was lost, and its file is gone: the call's answer is what the outbox says, not a new failure."""
    contents = {"report.txt": b"All well."}

    def read_bytes(context: ToolContext, path: str, limit: int) -> bytes:
        if path not in contents:
            raise SandboxError(f"{path} is not there")
        return contents[path]

    arguments = {"subject": "Report", "body": "See there.", "attachments": ["report.txt"]}
    with mail_server() as server:
        tool = mail_tool(Server("127.0.0.1", server.port), "me@example.org", ["me@example.org"])
        environment: Any = SimpleNamespace(read_bytes=read_bytes)
        context = ToolContext("5" * 32, 0, "external", environment, tmp_path)
        first = tool.run(arguments, context)
        contents.clear()
        assert tool.run(arguments, context) == first
        assert len(server.inbox) == 1


def test_mail_goes_to_named_addresses_only(tmp_path: Path) -> None:
    tool = mail_tool(Server("127.0.0.1", 1), "me@example.org", ["me@example.org"])
    assert tool.policy == "external" and tool.external_token
    with pytest.raises(CallFailed, match="mail to eve@example.org is not allowed; it may go to me@example.org"):
        tool.run({"to": "eve@example.org", "subject": "s", "body": "b"}, context(tmp_path))
    with pytest.raises(CallFailed, match="the subject cannot be used"):
        tool.run({"subject": "s\nBcc: eve@example.org", "body": "b"}, context(tmp_path))
    with pytest.raises(CallFailed, match="x.pdf cannot be attached"):
        tool.run({"subject": "s", "body": "b", "attachments": ["x.pdf"]}, context(tmp_path))
    assert not (tmp_path / "outbox").exists()


def test_skills_are_listed_and_read_on_demand(tmp_path: Path) -> None:
    skills = find_skills([RECIPES / "report" / "skills"])
    assert list(skills) == ["house-report"]
    text = listing(skills)
    assert "house-report: How our HTML reports look" in text and "<h1>" not in text
    tool = skill_tool(skills)
    whole = tool.run({"name": "house-report"}, context(tmp_path)).output
    assert whole.startswith("# House style") and "style.css" in whole and "description:" not in whole
    place = context(tmp_path)
    assert "font-family" in tool.run({"name": "house-report", "file": "style.css"}, place).output
    assert list(place.environment.written) == ["skills/house-report/style.css"]  # type: ignore[attr-defined]
    for wrong in ({"name": "other"}, {"name": "house-report", "file": "../../budget/replies.json"}):
        with pytest.raises(CallFailed, match="there is no skill|has no file"):
            tool.run(wrong, context(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# No front matter", "has no `name`"),
        ("---\nname: x\n---\n", "has no `description`"),
        ("---\nname: Big Name\ndescription: d\n---\n", "has the name 'Big Name'"),
    ],
)
def test_broken_skills_are_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "SKILL.md").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_skill(tmp_path)


def test_front_matter_as_people_write_it(tmp_path: Path) -> None:
    (tmp_path / "SKILL.md").write_text(
        "---\nname: 'a-b'\ndescription: >\n  Two lines\n  joined: here.\nlicense: MIT\n---\nBody\n"
    )
    (tmp_path / "outside").symlink_to("/etc/hostname")
    skill = read_skill(tmp_path)
    assert (skill.name, skill.description, skill.text) == ("a-b", "Two lines joined: here.", "Body\n")
    assert skill.files == ()
    with pytest.raises(ConfigError, match="holds no skill"):
        find_skills([RECIPES])


def test_two_tools_of_one_name() -> None:
    with pytest.raises(ConfigError, match="two tools are called 'shell'"):
        ToolBox([*standard_tools(), standard_tools()[0]])
    assert all(tool.parameters["additionalProperties"] is False for tool in standard_tools())


SERVER = '''
import sys, os
from mcp.server.mcpserver import MCPServer, Context
from mcp_types import ToolAnnotations
server = MCPServer("things")

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

@server.tool()
def fail() -> str:
    """Always fails."""
    raise ValueError("no luck")

@server.tool()
def vanish() -> str:
    """Ends the server."""
    os._exit(1)

if sys.argv[1] == "http":
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
server.run("stdio")
'''


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


def configured(tmp_path: Path, **entry: Any) -> list[Any]:
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {"my things": entry}}))
    return read_servers(path)


def by_name(tools: list[Tool]) -> dict[str, Tool]:
    return {tool.name: tool for tool in tools}


def test_tools_of_an_mcp_server_over_stdio(program: Path, tmp_path: Path) -> None:
    with McpTools(configured(tmp_path, command=sys.executable, args=[str(program), "stdio"])) as connected:
        tools = by_name(connected.tools)
        assert list(tools) == ["my_things_add", "my_things_fail", "my_things_vanish"]
        assert (tools["my_things_add"].policy, tools["my_things_fail"].policy) == ("rerun", "external")
        assert tools["my_things_add"].parameters["required"] == ["a", "b"]
        here = context(tmp_path)
        assert tools["my_things_add"].run({"a": 2, "b": 3}, here).output == "5"
        failed = tools["my_things_fail"].run({}, here)
        assert failed.exit_code == 1 and failed.output.startswith("error: ")
        with pytest.raises(InfraFailed, match="broke off during vanish"):
            tools["my_things_vanish"].run({}, here)
        with pytest.raises(CallFailed, match="did not answer add"):
            tools["my_things_add"].run({"a": 2, "b": 3}, here)
        [link] = connected._links
        asyncio.run_coroutine_threadsafe(link.close(), connected._loop).result(30)
        with pytest.raises(CallFailed, match="fail was not asked for"):
            tools["my_things_fail"].run({}, here)


@pytest.mark.slow
def test_tools_of_an_mcp_server_over_http(program: Path, tmp_path: Path) -> None:
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(program), "http", str(port)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
        with McpTools(configured(tmp_path, url=f"http://127.0.0.1:{port}/mcp", policy="rerun")) as connected:
            tools = by_name(connected.tools)
            assert tools["my_things_add"].run({"a": 20, "b": 3}, context(tmp_path)).output == "23"
            assert tools["my_things_fail"].policy == "rerun"
    finally:
        process.kill()
        process.wait()


def test_mcp_servers_that_cannot_be(tmp_path: Path) -> None:
    from rorqual.agents.errors import AgentError

    before = threading.active_count()
    with pytest.raises(AgentError, match="the MCP server 'my things'"):
        McpTools(configured(tmp_path, command="/nowhere/at/all"))
    assert threading.active_count() == before
    for entry, said in (({}, "needs either a command or a url"), ({"url": "x", "policy": "rollback"}, "the policy")):
        with pytest.raises(ConfigError, match=said):
            configured(tmp_path, **entry)
    (tmp_path / "mcp.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no configuration of MCP servers"):
        read_servers(tmp_path / "mcp.json")


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Any]:
    made = Maker(tmp_path / "sandboxes").create("container", metadata={})
    yield made
    made.kill()


def test_a_sandbox_lost_before_its_command_is_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Toolkit and request were there, then the sandbox went: the command must find both in the new one."""
    from rorqual.agents.environment import Environment, EnvironmentSettings
    from rorqual.agents.log import TrajectoryLog
    from rorqual.journal import Journal

    run, lost = Commands.run, []

    def lose_first(self: Any, *args: Any, **options: Any) -> Any:
        if not lost:
            lost.append(self._sandbox.id)
            self._sandbox.kill()
        return run(self, *args, **options)

    monkeypatch.setattr(Commands, "run", lose_first)
    with Journal(tmp_path / "journal") as journal:
        environment = Environment(Maker(tmp_path / "s"), EnvironmentSettings(), TrajectoryLog(journal), "t")
        place = ToolContext("cd" * 16, 0, "rerun", environment, tmp_path / "outbox")
        outcome = by_name(standard_tools())["write_file"].run({"path": "big.txt", "content": "x" * 300_000}, place)
        assert outcome.exit_code == 0, outcome.output
        assert environment.sandbox.files.read("big.txt") == "x" * 300_000 and environment.sandbox.id not in lost
        environment.end()


def test_large_requests_go_by_file_and_outputs_are_cut(tmp_path: Path, sandbox: Any) -> None:
    from rorqual.agents.environment import Environment, EnvironmentSettings
    from rorqual.agents.log import TrajectoryLog
    from rorqual.journal import Journal

    with Journal(tmp_path / "journal") as journal:
        log = TrajectoryLog(journal)
        environment = Environment(Maker(tmp_path / "s"), EnvironmentSettings(), log, "t")
        place = ToolContext("cd" * 16, 0, "rerun", environment, tmp_path / "outbox")
        tools = by_name(standard_tools())
        big = "ä" * 300_000
        assert tools["write_file"].run({"path": "big.txt", "content": big}, place).exit_code == 0
        assert environment.sandbox.files.read("big.txt") == big
        other = ToolContext("ef" * 16, 1, "rollback", environment, tmp_path / "outbox")
        shown: Outcome = tools["shell"].run({"command": "cat big.txt; echo oops >&2; exit 3"}, other)
        assert (
            shown.exit_code == 3 and len(shown.output.encode()) < 32 * 1024 and shown.output.endswith("[exit code 3]")
        )
        with pytest.raises(CallFailed, match="put it into files"):
            tools["python"].run({"code": "#" * 300_000}, other)
        environment.end()
