"""Sandboxes kept outside of the data folder are listed, found, swept, and keep what they stand on."""

import json
import time
from pathlib import Path

import pytest

from rorqual.cli.app import main
from rorqual.errors import SandboxError
from rorqual.sandbox import Sandbox, bases
from rorqual.sandbox.drivers.base import Process, Running
from rorqual.sandbox.edge import Edge, _clear_up
from rorqual.sandbox.errors import Gone
from rorqual.sandbox.home import Home, Record
from rorqual.sandbox.images.collect import collect
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.processes import identify
from rorqual.sandbox.spec import SandboxSpec


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def living(base: Path, image: str | None = None, *, alive: bool = True) -> Home:
    """A sandbox's folder, with this very process (or none) as its keeper."""
    home = Home.make("container", base)
    record = Record(home.id, "bwrap", SandboxSpec("container", image=image), time.time(), state="ready")
    keeper = identify(1) if alive else Process(2**22 - 1, 1)
    assert keeper is not None
    record.running = Running([keeper], {"unix": "channel"}, "00")
    home.write(record)
    home.unlock()
    return home


def layer(store: Store, tmp_path: Path, text: str) -> str:
    (tmp_path / text).mkdir()
    (tmp_path / text / "file").write_text(text)
    return store.pack(tmp_path / text)


def test_layers_under_sandboxes_kept_elsewhere_are_not_collected(tmp_path: Path, data: Path) -> None:
    store = Store()
    digests = [layer(store, tmp_path, name) for name in ("here", "edge", "elsewhere")]
    for digest, base in zip(digests, (data, data / "edges" / "node", tmp_path / "scratch" / "node"), strict=True):
        store.name(digest[:8], [digest], kind="snapshot", owner="gone", keep=False)
        living(base, digest[:8])
    assert collect(store, grace_s=0).layers == []
    bases.forget(tmp_path / "scratch" / "node")
    assert collect(store, grace_s=0).layers == digests[2:]


def test_what_cannot_be_looked_into_stops_the_collection(tmp_path: Path, data: Path) -> None:
    store = Store()
    digest = layer(store, tmp_path, "loose")
    living(tmp_path / "far")
    note = next((data / "bases").iterdir())
    told = json.loads(note.read_text())
    note.write_text(json.dumps({**told, "folder": "/nowhere/at/all", "machine": "another"}))
    with pytest.raises(SandboxError, match="/nowhere/at/all on machine another has sandboxes"):
        collect(store, grace_s=0)
    assert Sandbox.list() == []
    note.write_text("{")
    with pytest.raises(SandboxError, match="cannot be read"):
        collect(store, grace_s=0)
    assert store.layer(digest).digest == digest
    note.write_text(json.dumps({**told, "folder": "/nowhere/at/all"}))
    assert collect(store, grace_s=0).layers == [digest], "a folder of this machine that is gone has no sandboxes"
    bases.forget_missing()
    assert not list((data / "bases").iterdir())


def test_they_are_listed_found_and_pruned(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = (data, data / "edges" / "node", tmp_path / "far")
    alive = [living(base) for base in places]
    dead = [living(base, alive=False) for base in places]
    assert {info.id for info in Sandbox.list()} >= {home.id for home in alive}
    assert {info.id for info in Sandbox.list(home=tmp_path / "far")} <= {alive[2].id, dead[2].id}
    assert [Home.find(home.id).path for home in alive] == [home.path for home in alive]
    with pytest.raises(SystemExit):
        main(["sandbox", "prune", "--json"])
    assert sorted(json.loads(capsys.readouterr().out)["removed"]) == sorted(home.id for home in dead)
    assert all(home.path.exists() for home in alive)
    with pytest.raises(Gone) as caught:
        Home.find(dead[2].id)
    assert caught.value.reason == "crashed"
    with pytest.raises(SystemExit):
        main(["sandbox", "list", "--json"])
    listed = {json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()}
    assert listed == {home.id for home in alive}


def test_an_edge_makes_its_folder_known_and_takes_that_back(tmp_path: Path, data: Path) -> None:
    import asyncio

    async def scene() -> None:
        edge = Edge(tmp_path / "edges" / "a")
        await edge.start()
        assert tmp_path / "edges" / "a" in bases.known()
        dead = Edge(tmp_path / "edges" / "b")
        dead._lock = None
        bases.register(tmp_path / "edges" / "b")
        (tmp_path / "edges" / "b" / "edge.lock").touch()
        _clear_up(tmp_path / "edges" / "a")
        assert tmp_path / "edges" / "b" not in bases.known()
        await edge.close()

    asyncio.run(scene())
    assert bases.known() == [data]
    assert not list((data / "bases").iterdir())


def test_the_data_folder_itself_needs_no_note(data: Path) -> None:
    Home.make("container").unlock()
    Home.make("container", data).unlock()
    assert not (data / "bases").exists() and bases.known() == [data]
