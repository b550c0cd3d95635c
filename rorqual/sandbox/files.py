"""Files of a sandbox, opened inside by the guest agent with the rights of the sandbox's user.

Paths are those inside; a relative one counts from the user's home. No path of the host is ever joined with one of the
sandbox: downloads are written beneath a folder through directory descriptors that follow no link.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, overload

from rorqual.errors import SandboxError
from rorqual.sandbox.channel import AgentRefusal
from rorqual.sandbox.errors import FileError
from rorqual.sandbox.transfer import Receiver, local_tree
from rorqual.sandbox.wire import Fields, Tag, Type, Value

if TYPE_CHECKING:
    from rorqual.sandbox.async_sandbox import AsyncSandbox

PIECE = 256 << 10
MAX_TRANSFER = 64 << 20
MAX_FILES = 50_000


@dataclass(frozen=True)
class FileInfo:
    """One file. path: relative to the folder that was listed; kind: file, folder, link, fifo, socket or device."""

    path: str
    kind: str
    size: int
    mode: int
    modified: float
    target: str | None = None


Paths = list[Path]  # `list` is a method of the class below
FileInfos = list[FileInfo]


class Files:
    """`sandbox.files`."""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    def _absolute(self, path: str) -> str:
        text = os.fspath(path)
        if "\0" in text or not text:
            raise SandboxError(f"{text!r} is no path.")
        if text.startswith("/"):
            return text
        spec = self._sandbox._record.spec
        home = "/root" if spec.user == "root" else f"/home/{spec.user}"
        return str(PurePosixPath(spec.cwd or home, text))

    async def _ask(self, kind: Type, path: str, *fields: tuple[Tag, Value]) -> Fields:
        try:
            return await self._sandbox._ask(kind, [(Tag.PATH, self._absolute(path)), *fields])
        except AgentRefusal as refusal:
            raise FileError(refusal.number, f"{os.strerror(refusal.number)} (inside the sandbox)", path) from refusal

    @overload
    async def read(
        self, path: str, *, format: Literal["text"] = "text", offset: int = 0, limit: int | None = None
    ) -> str: ...

    @overload
    async def read(
        self, path: str, *, format: Literal["bytes"], offset: int = 0, limit: int | None = None
    ) -> bytes: ...

    async def read(
        self, path: str, *, format: Literal["text", "bytes"] = "text", offset: int = 0, limit: int | None = None
    ) -> str | bytes:
        """A file's content from byte `offset` on, at most `limit` bytes (64 MiB unless named).

        Raises: FileError when it is not there, no plain file, or larger than 64 MiB without a limit.
        """
        data = bytearray()
        most = MAX_TRANSFER if limit is None else limit
        while len(data) < most:
            wanted = min(PIECE, most - len(data))
            fields = await self._ask(Type.FILE_READ, path, (Tag.OFFSET, offset + len(data)), (Tag.LIMIT, wanted))
            if limit is None and fields.number(Tag.SIZE) - offset > MAX_TRANSFER:
                raise FileError(27, f"it has {fields.number(Tag.SIZE):,} bytes; name a limit to read part of it", path)
            piece = fields.bytes(Tag.DATA)
            data += piece
            if len(piece) < wanted:
                break
        return bytes(data) if format == "bytes" else data.decode("utf-8", errors="replace")

    async def write(
        self, path: str, data: str | bytes, *, mode: int = 0o644, append: bool = False, mkdirs: bool = True
    ) -> None:
        """Write a whole file: readers see the old content or the new, never a part. append: add to it instead.

        Raises: FileError; SandboxError for more than 64 MiB at once.
        """
        raw = data.encode() if isinstance(data, str) else bytes(data)
        if len(raw) > MAX_TRANSFER:
            raise SandboxError(
                f"{path}: {len(raw):,} bytes are more than the 64 MiB of one call. Use append=True in parts."
            )
        flags = (1 if append else 0) | (2 if mkdirs else 0)
        token = secrets.token_bytes(16)
        for start in range(0, max(1, len(raw)), PIECE):
            piece = raw[start : start + PIECE]
            await self._ask(
                Type.FILE_WRITE,
                path,
                *((Tag.OFFSET, start), (Tag.DATA, piece), (Tag.MODE, mode), (Tag.FLAGS, flags), (Tag.TOKEN, token)),
                (Tag.DONE, int(start + PIECE >= len(raw))),
            )
        about = {"path": path, "size": len(raw), "append": append}
        await self._sandbox._history().write("file_write", about, durable=False)

    async def list(self, path: str, depth: int = 1) -> FileInfos:
        """What lies in a folder, `depth` levels down, by path. Raises: FileError; SandboxError for more than 50,000."""
        fields = await self._ask(Type.FILE_LIST, path, (Tag.DEPTH, max(1, depth)))
        if fields.has(Tag.TRUNCATED):
            raise SandboxError(
                f"{path} holds too much for one list (50,000 entries or 512 KiB of names). List its parts."
            )
        return sorted((_info(Fields(one)) for one in fields.all(Tag.ENTRY)), key=lambda info: info.path)

    async def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """One file. Raises: FileError when it is not there."""
        return _info(await self._ask(Type.FILE_STAT, path, (Tag.FLAGS, int(follow))))

    async def exists(self, path: str) -> bool:
        """Whether there is something of that name, a dangling link included."""
        try:
            await self.stat(path, follow=False)
        except FileError as error:
            if error.errno in (2, 20):  # ENOENT, ENOTDIR
                return False
            raise
        return True

    async def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Make a folder and those above it; fine if it is there."""
        await self._ask(Type.FILE_MKDIR, path, (Tag.MODE, mode))

    async def move(self, src: str, dst: str) -> None:
        """Rename, replacing a file of the new name."""
        await self._ask(Type.FILE_MOVE, src, (Tag.TARGET, self._absolute(dst)))
        await self._sandbox._history().write("file_move", {"path": src, "target": dst}, durable=False)

    async def remove(self, path: str, recursive: bool = False) -> None:
        """Remove a file or an empty folder; with `recursive` a whole tree (links are removed, not followed)."""
        await self._ask(Type.FILE_REMOVE, path, (Tag.FLAGS, int(recursive)))
        await self._sandbox._history().write("file_remove", {"path": path}, durable=False)

    async def upload(self, local: str | Path, remote: str) -> int:
        """Copy a file or a tree from the host; returns how many files. Links are kept as links.

        Raises: PolicyRejected for devices, sockets and links that lead out of the tree; nothing is copied then.
        """
        entries = local_tree(Path(local))
        count = 0
        for entry in entries:
            target = remote if entry.path == "" else str(PurePosixPath(remote, entry.path))
            if entry.kind == "folder":
                await self.mkdir(target, entry.mode)
            elif entry.kind == "link":
                await self._ask(Type.FILE_LINK, target, (Tag.TARGET, entry.target or ""))
            else:
                await self._upload_file(entry.source, target, entry.mode)
                count += 1
        return count

    async def _upload_file(self, source: Path, target: str, mode: int) -> None:
        token = secrets.token_bytes(16)
        offset = 0
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            piece = file.read(PIECE)
            while True:
                following = file.read(PIECE)
                await self._ask(
                    Type.FILE_WRITE,
                    target,
                    *((Tag.OFFSET, offset), (Tag.DATA, piece), (Tag.MODE, mode), (Tag.FLAGS, 2), (Tag.TOKEN, token)),
                    (Tag.DONE, int(not following)),
                )
                offset += len(piece)
                if not following:
                    return
                piece = following

    async def download(
        self, remote: str, local: str | Path, *, max_bytes: int = MAX_TRANSFER, max_files: int = 10_000
    ) -> Paths:
        """Copy a file or a tree to the host; returns the files written, all with mode 0600.

        A tree goes into the folder `local`, which is made; links that stay inside it are kept, set-id bits are not.
        Raises: PolicyRejected for links that lead out, devices, sockets, odd names, or more than the limits; what
        was written of the tree is removed then.
        """
        info = await self.stat(remote)
        with Receiver(Path(local), max_bytes, max_files) as receiver:
            if info.kind != "folder":
                await self._download_file(receiver, remote, None, info)
            else:
                entries = await self._walk(remote, max_files)
                receiver.check(entries)
                for entry in entries:
                    if entry.kind == "folder":
                        receiver.folder(entry.path)
                    elif entry.kind == "file":
                        await self._download_file(receiver, str(PurePosixPath(remote, entry.path)), entry.path, entry)
                for entry in entries:  # links last: nothing is written through one
                    if entry.kind == "link":
                        receiver.link(entry.path, entry.target or "")
            return receiver.keep()

    async def _walk(self, remote: str, max_files: int) -> FileInfos:
        found: FileInfos = []
        todo = [""]
        while todo:
            folder = todo.pop()
            for entry in await self.list(str(PurePosixPath(remote, folder)) if folder else remote):
                path = f"{folder}/{entry.path}" if folder else entry.path
                found.append(FileInfo(path, entry.kind, entry.size, entry.mode, entry.modified, entry.target))
                if entry.kind == "folder":
                    todo.append(path)
            if len(found) > 2 * max_files + 1000:
                break  # the receiver refuses it
        return sorted(found, key=lambda info: info.path)

    async def _download_file(self, receiver: Receiver, remote: str, path: str | None, info: FileInfo) -> None:
        with receiver.file(path, info.kind) as write:
            offset = 0
            while True:
                fields = await self._ask(Type.FILE_READ, remote, (Tag.OFFSET, offset), (Tag.LIMIT, PIECE))
                piece = fields.bytes(Tag.DATA)
                write(piece)
                offset += len(piece)
                if len(piece) < PIECE:
                    return


def _info(fields: Fields) -> FileInfo:
    return FileInfo(
        path=fields.text(Tag.PATH),
        kind=fields.text(Tag.KIND),
        size=fields.number(Tag.SIZE),
        mode=fields.number(Tag.MODE),
        modified=fields.number(Tag.MTIME_US) / 1e6,
        target=fields.text(Tag.TARGET) if fields.has(Tag.TARGET) else None,
    )
