"""A control group of Linux that limits the memory of a child process, page cache included; versions 1 and 2."""

import contextlib
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class Limit:
    """A group of its own with a limit of `nbytes`."""

    def __init__(self, folder: Path, nbytes: int, *, is_v2: bool) -> None:
        self.folder, self.nbytes, self.is_v2 = folder, nbytes, is_v2
        self._peak_file = "memory.peak" if is_v2 else "memory.max_usage_in_bytes"

    @classmethod
    def make(cls, nbytes: int) -> "tuple[Limit | None, str]":
        """A new group, or None and why there is none."""
        is_v2 = (ROOT / "cgroup.controllers").exists()
        name = f"rorqual-{os.getpid()}"
        folder = _own_group() / name if is_v2 else ROOT / "memory" / name
        try:
            folder.mkdir()
        except OSError as error:
            return None, f"a control group cannot be made at {folder} ({error.strerror}); it takes root or delegation"
        try:
            if is_v2:
                (folder / "memory.max").write_text(str(nbytes))
                with contextlib.suppress(OSError):  # a kernel without swap accounting
                    (folder / "memory.swap.max").write_text("0")
            else:
                (folder / "memory.limit_in_bytes").write_text(str(nbytes))
        except OSError as error:
            folder.rmdir()
            return None, f"the group at {folder} takes no memory limit ({error.strerror})"
        return cls(folder, nbytes, is_v2=is_v2), ""

    def join(self) -> None:
        """Put the calling process into the group; for a child before it runs anything."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int | None:
        """The most memory that the group used since `forget_peak`, in bytes; None where the kernel does not say."""
        file = self.folder / self._peak_file
        return int(file.read_text()) if file.exists() else None

    def forget_peak(self) -> None:
        """Start the peak again, where the kernel can."""
        with contextlib.suppress(OSError):
            (self.folder / self._peak_file).write_text("0")

    def remove(self) -> None:
        """Take the group away; its processes have ended."""
        with contextlib.suppress(OSError):
            if not self.is_v2:
                (self.folder / "memory.force_empty").write_text("0")
        self.folder.rmdir()


def _own_group() -> Path:
    """The version 2 group of this process."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return ROOT / line.removeprefix("0::").lstrip("/")
    return ROOT
