"""A real base image from Debian's packages; needs the network and mmdebstrap, and is skipped without."""

import shutil
from pathlib import Path

import pytest
from full import often

from rorqual.errors import SandboxError
from rorqual.sandbox import Sandbox
from rorqual.sandbox.images import base
from rorqual.sandbox.images.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_real_base_runs_python(home: Path) -> None:
    if not often(0, 1):
        pytest.skip("fetches 50 MB of packages and takes a minute; RORQUAL_TEST_FULL=1 runs it")
    if shutil.which("mmdebstrap") is None or base.missing() is not None:
        pytest.skip(f"no image can be built here: {base.missing() or 'no mmdebstrap'}")
    said: list[str] = []
    try:
        reference = base.build_base(Store(), "tiny", packages=("python3-minimal",), progress=said.append)
    except SandboxError as error:
        if "is the network there" in str(error):
            pytest.skip("the packages cannot be fetched: no network")
        raise
    assert any(line.startswith("I: ") for line in said)
    store = Store()
    names = {b"/".join(entry.path) for entry in store.tree(reference.layers[0]).entries()}
    assert b"etc/passwd" in names and b"home/agent" in names
    assert not names & {b"etc/resolv.conf", b"etc/hostname", b"etc/passwd-"}, "nothing of this machine"
    assert not [name for name in names if name.startswith(b"usr/share/doc/")]
    latest = max(entry.attributes.mtime_ns for entry in store.tree(reference.layers[0]).entries())
    assert latest == int(base._EPOCH) * 10**9
    try:
        sandbox = Sandbox.create("container", image="tiny")
    except SandboxError as error:
        pytest.skip(f"no container to try it in: {error}")
    with sandbox:
        result = sandbox.commands.run(["python3", "-c", "import sys, os; print(sys.version_info[0], os.getuid())"])
        assert result.stdout == "3 1000\n"
        assert "/home/agent" in sandbox.commands.run("cat /etc/passwd").stdout
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(home) in line]
