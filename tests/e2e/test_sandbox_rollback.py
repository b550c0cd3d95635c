"""Going back to a snapshot that cannot be stood on: refused before anything that runs is ended."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import need

from rorqual import Sandbox
from rorqual.errors import SandboxError
from rorqual.sandbox.agent.build import FOLDER
from rorqual.sandbox.drivers.bwrap import MAX_LOWERS
from rorqual.sandbox.errors import SnapshotFailed, Unsupported
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.spec import Snapshot


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox.create(**need(("container", "bwrap"))) as made:  # type: ignore[arg-type]
        yield made


def stands(sandbox: Sandbox, pid: str) -> bool:
    """Whether nothing happened to it: same processes, same files, same incarnation."""
    alive = sandbox.commands.run(["kill", "-0", pid]).exit_code == 0
    return alive and sandbox.files.read("f") == "two" and sandbox.info().incarnation == 1


def prepared(sandbox: Sandbox) -> tuple[Snapshot, str]:
    """A snapshot, and the number of a process that was started after it."""
    sandbox.files.write("f", "one")
    taken = sandbox.snapshot()
    sandbox.files.write("f", "two")
    sandbox.commands.start("echo $$ > pid; exec sleep 1000")
    while sandbox.commands.run("test -s pid").exit_code != 0:
        pass
    return taken, sandbox.files.read("pid").strip()


def test_a_layer_that_is_gone_or_damaged_ends_nothing(sandbox: Sandbox) -> None:
    taken, pid = prepared(sandbox)
    path = Store().objects.path(f"objects/{taken.digest[:2]}/{taken.digest}")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SandboxError, match="damaged"):
        sandbox.rollback(taken)
    assert stands(sandbox, pid)
    path.unlink()
    with pytest.raises(SandboxError, match="no content"):
        sandbox.rollback(taken)
    assert stands(sandbox, pid)
    path.write_bytes(whole)
    sandbox.rollback(taken)
    assert sandbox.files.read("f") == "one" and sandbox.info().incarnation == 2


def test_more_layers_than_can_be_stacked_end_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    taken, pid = prepared(sandbox)
    store, layers = Store(), [taken.digest]
    for number in range(MAX_LOWERS):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "f").write_text(str(number))
        layers.append(store.pack(tmp_path / str(number)))
    reference = store.reference(taken.id)
    assert reference is not None
    store.name("high", layers, kind="snapshot", owner=sandbox.id, note=reference.note)
    with pytest.raises(Unsupported, match=f"more than a container is stacked from .{MAX_LOWERS}"):
        sandbox.rollback("high")
    assert stands(sandbox, pid)


def test_a_snapshot_that_is_none_of_its_own_ends_nothing(sandbox: Sandbox) -> None:
    _, pid = prepared(sandbox)
    with pytest.raises(SnapshotFailed, match="no snapshot of sandbox"):
        sandbox.rollback("nothing")
    assert stands(sandbox, pid)


def test_the_keeper_takes_as_many_layers_as_is_said() -> None:
    found = re.search(r"MAX_LOWERS = (\d+)", (FOLDER / "keep.c").read_text())
    assert found is not None and int(found[1]) == MAX_LOWERS
