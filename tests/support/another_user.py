"""Runs a test's body as an ordinary user where the tests run as root, and as who we are elsewhere."""

import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

UID = 54_321


def as_ordinary_user(body: Callable[[Path], Any]) -> Any:
    """What `body` returns, called with a folder of its own in a process without privileges.

    It must import nothing more: a virtual environment may be out of that user's reach.
    """
    folder = Path(tempfile.mkdtemp(prefix="rorqual-user-"))
    try:
        if os.geteuid() != 0:
            return body(folder)
        os.chown(folder, UID, UID)
        return _in_child(body, folder)
    finally:
        for path, _, _ in os.walk(folder):
            os.chmod(path, 0o700)
        shutil.rmtree(folder)


def _in_child(body: Callable[[Path], Any], folder: Path) -> Any:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            os.setgroups([])
            os.setresgid(UID, UID, UID)
            os.setresuid(UID, UID, UID)
            os.chdir("/")
            os.environ["HOME"] = str(folder)
            answer = pickle.dumps((True, body(folder)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(writing, "wb") as out:
            out.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        told = stream.read()
    os.waitpid(pid, 0)
    fine, value = pickle.loads(told)
    assert fine, value
    return value
