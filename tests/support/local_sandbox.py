"""A stand-in for a sandbox in tests of what lies above it: same calls, same memory of calls by key, no walls at all.

Commands are processes of their own session that outlive this one, as in a real sandbox, and what is known of a call
lies in files: `accepted`, then `exit`. Only for programs that the tests write themselves.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rorqual.sandbox.errors import Gone, OutcomeUnknown
from rorqual.sandbox.spec import CommandResult, Snapshot

RUNNER = """
import json, os, subprocess, sys
call = sys.argv[1]
spec = json.load(open(call + "/spec"))
with open(call + "/stdin", "rb") as i, open(call + "/out", "wb") as o, open(call + "/err", "wb") as e:
    code = subprocess.call(spec["argv"], cwd=spec["cwd"], stdin=i, stdout=o, stderr=e)
with open(call + "/exit.part", "w") as f:
    f.write(str(code))
os.rename(call + "/exit.part", call + "/exit")
"""


class Commands:
    def __init__(self, sandbox: "LocalSandbox") -> None:
        self._sandbox = sandbox

    def run(
        self, cmd: str | Sequence[str], *, timeout: float = 60, stdin: bytes | None = None, call: str | None = None
    ) -> CommandResult:
        self._sandbox.check()
        folder = self._sandbox.folder / "calls" / (call or uuid.uuid4().hex)
        is_known = folder.exists()
        was_finished = (folder / "exit").exists()
        if not is_known:
            argv = ["/bin/sh", "-c", cmd] if isinstance(cmd, str) else list(cmd)
            partial = folder.with_suffix(".part")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "spec").write_text(json.dumps({"argv": argv, "cwd": str(self._sandbox.work)}))
            (partial / "stdin").write_bytes(stdin or b"")
            partial.rename(folder)
            process = subprocess.Popen([sys.executable, "-c", RUNNER, str(folder)], start_new_session=True)
            put(folder / "pid", str(process.pid))
        return self._wait(folder, timeout, was_finished)

    def _wait(self, folder: Path, timeout: float, was_finished: bool) -> CommandResult:
        end = time.monotonic() + timeout
        while not (folder / "exit").exists():
            self._sandbox.check()
            if not (folder / "pid").exists() or not alive(int((folder / "pid").read_text())):
                if (folder / "exit").exists():
                    break
                raise OutcomeUnknown(f"{folder.name} was accepted and nothing runs")
            if time.monotonic() > end:
                os.killpg(int((folder / "pid").read_text()), signal.SIGKILL)
                return CommandResult(137, (folder / "out").read_bytes(), timed_out=True)
            time.sleep(0.002)
        code = int((folder / "exit").read_text())
        out, err = (folder / "out").read_bytes(), (folder / "err").read_bytes()
        return CommandResult(code, out, err, duration_ms=1.0, replayed=was_finished)


class Files:
    def __init__(self, sandbox: "LocalSandbox") -> None:
        self._sandbox = sandbox

    def _at(self, path: str) -> Path:
        self._sandbox.check()
        return self._sandbox.work / path

    def read(self, path: str, format: str = "text", limit: int | None = None) -> Any:
        data = self._at(path).read_bytes()[:limit]
        return data.decode() if format == "text" else data

    def write(self, path: str, data: str | bytes) -> None:
        target = self._at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data.encode() if isinstance(data, str) else data)

    def exists(self, path: str) -> bool:
        return self._at(path).exists()

    def mkdir(self, path: str) -> None:
        self._at(path).mkdir(parents=True, exist_ok=True)

    def upload(self, local: str, remote: str) -> None:
        shutil.copytree(local, self._at(remote), dirs_exist_ok=True)

    def download(self, remote: str, local: str, *, max_bytes: int, max_files: int) -> None:
        shutil.copytree(self._at(remote), local, dirs_exist_ok=True)


class LocalSandbox:
    """One stand-in; made by a `Maker`."""

    def __init__(self, root: Path, id: str) -> None:
        self.id, self.root, self.folder = id, root, root / id
        self.work = self.folder / "work"
        self.commands, self.files = Commands(self), Files(self)
        self.is_detached = False

    def check(self) -> None:
        if self.is_detached or not self.folder.exists():
            raise Gone(f"sandbox {self.id} is gone", "closed")

    def info(self) -> Any:
        return SimpleNamespace(kind="container", driver="local", isolation="process")

    def pause(self) -> None:
        self.check()

    def snapshot(self, kind: str) -> Snapshot:
        name = f"snap-{uuid.uuid4().hex[:8]}"
        shutil.copytree(self.work, self.root / "snapshots" / name)
        return Snapshot(name, "disk", name, 0, len(list((self.folder / "calls").glob("*"))))

    def rollback(self, snapshot: str) -> None:
        self.end_processes()
        shutil.rmtree(self.work)
        shutil.copytree(self.root / "snapshots" / snapshot, self.work)

    def end_processes(self) -> None:
        for path in (self.folder / "calls").glob("*/pid"):
            if not (path.parent / "exit").exists() and alive(pid := int(path.read_text())):
                os.killpg(pid, signal.SIGKILL)

    def detach(self) -> None:
        """Calls in flight end as with a real one's channel; what they started goes on."""
        self.is_detached = True

    def kill(self) -> None:
        if self.folder.exists():
            self.end_processes()
            shutil.rmtree(self.folder)


class Maker:
    """Makes and finds the stand-ins below a folder; counts how many were made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made = 0

    def create(self, kind: str, *, metadata: dict[str, str], snapshot: str | None = None) -> LocalSandbox:
        sandbox = LocalSandbox(self.root, uuid.uuid4().hex[:8])
        (sandbox.folder / "calls").mkdir(parents=True)
        if snapshot is None:
            sandbox.work.mkdir()
        else:
            shutil.copytree(self.root / "snapshots" / snapshot, sandbox.work)
        put(sandbox.folder / "metadata", json.dumps(metadata))
        self.made += 1
        return sandbox

    def connect(self, id: str, *, takeover: bool = False) -> LocalSandbox:
        sandbox = LocalSandbox(self.root, id)
        sandbox.check()
        return sandbox

    def end(self, id: str) -> None:
        LocalSandbox(self.root, id).kill()

    def list(self) -> list[Any]:
        found = []
        for path in self.root.glob("*/metadata"):
            with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
                found.append(SimpleNamespace(id=path.parent.name, metadata=json.loads(path.read_text())))
        return found


def put(path: Path, text: str) -> None:
    """Write a file that others read meanwhile: they see all of it or none."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    partial.write_text(text)
    partial.rename(path)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except FileNotFoundError:
        return False
