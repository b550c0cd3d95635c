"""Tools of other people's MCP servers, started over stdio or reached over streamable HTTP.

Their servers run on this machine with your rights, as in any other MCP client; only what they answer is text from
outside. A call that broke off is asked again only where the tool says that it reads only or is idempotent (or the
configuration does); any other ends the run when its outcome is unknown. Every call carries its key in `_meta`, so a
server can tell a call it has seen. Left out: resources, prompts, sampling and elicitation.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rorqual.agents.errors import AgentError, CallFailed, InfraFailed
from rorqual.agents.tools.base import Outcome, Policy, Tool, ToolContext
from rorqual.errors import ConfigError, MissingExtraError

CONNECT_S = 30.0
CALL_S = 600.0
KEY_META = "agents.rorqual/call-key"
_NAME = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class McpServer:
    """One entry of the configuration: a command to start, or an address. policy: of all its tools, where given."""

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    cwd: str | None = None
    url: str | None = None
    policy: Policy | None = None


def read_servers(path: Path) -> list[McpServer]:
    """The servers of a file in the form that MCP clients share: {"mcpServers": {NAME: {"command"|"url": ...}}}.

    Raises: ConfigError saying what in it is wrong.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["mcpServers"]
        return [_server(name, entry, path) for name, entry in entries.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is no configuration of MCP servers ({type(error).__name__}: {error}). Write "
            '{"mcpServers": {"name": {"command": "...", "args": []}}}.'
        ) from None


def _server(name: str, entry: Mapping[str, Any], path: Path) -> McpServer:
    command, url, policy = entry.get("command"), entry.get("url"), entry.get("policy")
    if (command is None) == (url is None):
        raise ConfigError(f"the MCP server {name!r} in {path} needs either a command or a url. Give one of them.")
    if policy not in (None, "rerun", "external"):
        raise ConfigError(f"the MCP server {name!r} in {path} has the policy {policy!r}. Use rerun or external.")
    return McpServer(name, command, tuple(entry.get("args") or ()), entry.get("env"), entry.get("cwd"), url, policy)


class McpTools:
    """Connections to servers, kept open in a thread of their own. Use as a context manager, or call `close`.

    said: file for what started servers write on stderr; nowhere otherwise.
    Raises: MissingExtraError without the package, AgentError for a server that cannot be reached.
    """

    def __init__(self, servers: list[McpServer], said: Path | None = None) -> None:
        try:
            import mcp  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                'MCP servers need the package mcp. Install it with: pip install "rorqual[agents]"'
            ) from error
        self._said = open(said or os.devnull, "a", encoding="utf-8")  # noqa: SIM115  # closed by `close`
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rorqual-mcp", daemon=True)
        self._thread.start()
        self._links: list[_Link] = []
        self.tools: list[Tool] = []
        try:
            for server in servers:
                link = _Link(server, self._said)
                self._links.append(link)
                self.tools += self._describe(link)
        except BaseException:
            self.close()
            raise

    def _describe(self, link: _Link) -> list[Tool]:
        server = link.server
        try:
            asyncio.run_coroutine_threadsafe(link.open(), self._loop).result(CONNECT_S)
            listed = asyncio.run_coroutine_threadsafe(link.list(), self._loop).result(CONNECT_S)
        except Exception as error:  # whatever its command or the network does
            raise AgentError(
                f"the MCP server {server.name!r} ({server.command or server.url}) cannot be used "
                f"({type(error).__name__}: {error}). Start it by hand to see why, or take it out of the file."
            ) from None
        return [self._tool(link, described) for described in listed]

    def _tool(self, link: _Link, described: Any) -> Tool:
        hints = described.annotations
        is_safe = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)
        policy: Policy = link.server.policy or ("rerun" if is_safe else "external")
        inner = described.name

        def run(arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
            future = asyncio.run_coroutine_threadsafe(link.call(inner, dict(arguments), context.key), self._loop)
            return _outcome(link.server.name, inner, future, policy)

        name = _NAME.sub("_", f"{link.server.name}_{inner}")
        return Tool(name, described.description or inner, described.input_schema, policy, run, outside=True)

    def close(self) -> None:
        """End the connections and the servers that were started."""
        for link in self._links:
            asyncio.run_coroutine_threadsafe(link.close(), self._loop).result(CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._said.close()

    def __enter__(self) -> McpTools:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Link:
    """One server. The connection is opened and closed by one task, as its cancel scopes demand."""

    def __init__(self, server: McpServer, said: TextIO) -> None:
        self.server, self._said = server, said
        self._client: Any = None
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._over = asyncio.Event()

    async def open(self) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold())
        await self._ready

    async def _hold(self) -> None:
        from mcp import Client, StdioServerParameters, stdio_client

        server = self.server
        target: Any = server.url
        if server.command is not None:
            env = dict(server.env) if server.env else None
            start = StdioServerParameters(command=server.command, args=list(server.args), env=env, cwd=server.cwd)
            target = stdio_client(start, errlog=self._said)
        assert self._ready is not None
        try:
            async with Client(target) as client:
                self._client = client
                self._ready.set_result(None)
                await self._over.wait()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error if isinstance(error, Exception) else ConnectionError(str(error)))
        finally:
            self._client = None

    async def list(self) -> list[Any]:
        found: list[Any] = []
        cursor = None
        while True:
            page = await self._client.list_tools(cursor=cursor) if cursor else await self._client.list_tools()
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                return found

    async def call(self, name: str, arguments: dict[str, Any], key: str) -> Any:
        if self._client is None:
            raise CallFailed(f"{self.server.name} has closed the connection, so {name} was not asked for")
        return await self._client.call_tool(name, arguments, meta={KEY_META: key})

    async def close(self) -> None:
        self._over.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CONNECT_S)


def _outcome(server: str, name: str, future: Future[Any], policy: Policy) -> Outcome:
    from mcp.shared.exceptions import MCPError
    from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT

    try:
        result = future.result(CALL_S)
    except CallFailed:
        raise
    except Exception as error:
        if isinstance(error, MCPError) and error.code not in (CONNECTION_CLOSED, REQUEST_TIMEOUT):
            raise CallFailed(f"{server} refused {name}: {error}") from None  # the server answered, and said no
        future.cancel()
        if policy == "rerun":
            raise CallFailed(f"{server} did not answer {name} ({type(error).__name__}: {error})") from None
        raise InfraFailed(
            f"the MCP server {server!r} broke off during {name} ({type(error).__name__}: {error}), so nobody knows "
            "whether it was done. It is not asked again. Look there, and mark the server's policy `rerun` if asking "
            "twice does no harm.",
            {"server": server, "tool": name, "outcome": "unknown"},
        ) from None
    parts = [_text(block) for block in result.content]
    text = "\n".join(parts) or "(no output)"
    return Outcome.text(f"error: {text}" if result.is_error else text, exit_code=1 if result.is_error else 0)


def _text(block: Any) -> str:
    text = getattr(block, "text", None)
    return text if isinstance(text, str) else f"({getattr(block, 'type', 'something')} that cannot be shown as text)"
