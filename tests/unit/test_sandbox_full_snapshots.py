"""Which full snapshots of machines are collected, which stay, and who says so. No machine is started."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rorqual.cli.app import main
from rorqual.errors import SandboxError
from rorqual.journal import Close, EnvSnapshot, Journal, Request
from rorqual.sandbox.drivers.base import Process, Running
from rorqual.sandbox.home import Home, Record
from rorqual.sandbox.images.collect import collect, collect_full
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.spec import SandboxSpec
from rorqual.sandbox.vm import snapshot


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def taken(tmp_path: Path, draft: snapshot.Draft | None = None, **named: object) -> str:
    """A full snapshot of 300 kB; with `named`, the name that leads there."""
    (tmp_path / "state").write_bytes(os.urandom(200_000))
    (tmp_path / "disk").write_bytes(os.urandom(100_000))
    identity = snapshot.store(tmp_path / "state", [tmp_path / "disk"], {}, 1, "ab" * 32, draft=draft).id
    if named:
        name, keep, owner = named["name"], bool(named.get("keep")), str(named.get("owner", "gone"))
        Store().name(str(name), [], kind="snapshot", owner=owner, keep=keep, note={"full": identity})
    return identity


def suspended(words: str) -> Home:
    """A machine whose memory is on disk, made from the snapshot of that name."""
    home = Home.make("vm")
    record = Record(home.id, "qemu-tcg", SandboxSpec("vm", snapshot=words), time.time(), state="paused")
    record.running = Running([Process(2**22 - 1, 1)], {"unix": "channel"}, "00")
    home.write(record)
    (home.path / "suspended").touch()
    home.unlock()
    return home


def test_only_full_snapshots_that_nothing_needs_are_collected(tmp_path: Path, data: Path) -> None:
    ids = {name: taken(tmp_path, name=name) for name in ("over", "in-use", "logged", "closed")}
    ids["kept"] = taken(tmp_path, name="kept", keep=True)
    ids["nameless"] = taken(tmp_path)
    ids["by-id"] = taken(tmp_path)
    ids["owned"] = taken(tmp_path, name="owned", owner=suspended("in-use").id)
    suspended(ids["by-id"])
    with Journal(tmp_path / "journal") as journal:
        for number, name in enumerate(("logged", "closed")):
            journal.append(Request(trajectory=name, request=number))
            journal.append(EnvSnapshot(f"s{number}", name, "full", 1, number))
        journal.append(Close(request=1, stop_reason="end"))
        journal.commit()

    def run(grace_s: float, dry_run: bool = False) -> set[str]:
        done = collect(Store(), journals=[tmp_path / "journal"], grace_s=grace_s, dry_run=dry_run)
        assert done.bytes >= 300_000 * len(done.full)
        return {name for name, identity in ids.items() if identity in done.full}

    assert run(3600) == set(), "all is young"
    assert run(0, dry_run=True) == {"over", "closed", "nameless"} and len(snapshot.sizes()) == len(ids)
    assert run(0) == {"over", "closed", "nameless"}
    assert set(snapshot.sizes()) == {ids[name] for name in ("in-use", "logged", "kept", "by-id", "owned")}
    assert {one.name for one in Store().references()} == {"in-use", "logged", "kept", "owned"}
    for identity in snapshot.sizes():
        snapshot.verify(snapshot.read(identity))
    assert collect(Store(tmp_path / "another store"), grace_s=0).full == [], "its names say nothing of these"


def test_one_that_is_being_made_or_read_stays(tmp_path: Path) -> None:
    with snapshot.Draft() as draft:
        (draft.folder / "state").write_bytes(b"half")
        assert collect_full(grace_s=0).temporary == 0 and (draft.folder / "state").exists()
        (draft.folder / "state").unlink()
        identity = taken(tmp_path, draft)
        assert collect_full(grace_s=0).full == [], "it is whole, but has no name yet"
    manifest = snapshot.read(identity)
    with snapshot.reading(manifest):
        assert collect_full(grace_s=0).full == []
    assert collect_full(grace_s=0).full == [identity]
    with pytest.raises(SandboxError, match="there is no full snapshot"), snapshot.reading(manifest):
        raise AssertionError("it is gone")


def test_what_a_killed_writer_left_is_taken_away(tmp_path: Path, data: Path) -> None:
    write = (
        "import os\nfrom rorqual.sandbox.vm import snapshot\n"
        "with snapshot.Draft() as draft:\n    (draft.folder / 'state').touch()\n    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", write]).returncode == -9
    broken = taken(tmp_path)
    (snapshot.folder() / broken / "manifest.json").unlink()  # its removal was broken off
    (snapshot.folder() / "notes").write_text("somebody's")
    done = collect_full()
    assert (done.temporary, done.full) == (1, [broken])
    assert [path.name for path in snapshot.folder().iterdir()] == ["notes"]


def test_a_draft_that_cannot_be_named_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no name"), snapshot.Draft() as draft:
        taken(tmp_path, draft)
        raise OSError("no name")
    assert list(snapshot.folder().iterdir()) == []


def test_the_commands_say_and_do_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["sandbox", *words])
        assert not ended.value.code
        return capsys.readouterr().out

    kept, loose = taken(tmp_path, name="kept", keep=True), taken(tmp_path)
    assert "2 full snapshot(s), 0.6 MB in " in run("list") and "MB" in run("image", "list")
    assert run("prune") == "nothing to remove\n", "they are young"
    long_ago = time.time() - 10_000
    for identity in (kept, loose):
        os.utime(snapshot.folder() / identity / "manifest.json", (long_ago, long_ago))
    assert json.loads(run("image", "gc", "--dry-run", "--json"))["full"] == [loose]
    assert "1 full snapshot(s)" in run("image", "gc", "--dry-run")
    done = json.loads(run("prune", "--json"))
    assert done["snapshots"] == [loose] and done["bytes"] >= 300_000
    assert set(snapshot.sizes()) == {kept}
