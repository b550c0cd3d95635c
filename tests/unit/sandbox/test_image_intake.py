"""Other people's archives become layers and go out again; builders may fail; only what nobody needs is collected."""

import gzip
import hashlib
import io
import json
import os
import shlex
import stat
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from little_tree import described, make_tree

from rorqual.cli import main
from rorqual.errors import JournalError, SandboxError
from rorqual.journal import Close, EnvSnapshot, Journal, Request
from rorqual.sandbox.images import base
from rorqual.sandbox.images.collect import collect
from rorqual.sandbox.images.erofs import Writer
from rorqual.sandbox.images.export import export_image
from rorqual.sandbox.images.intake import add_tar, import_image
from rorqual.sandbox.images.stack import add_difference, add_merged, seen
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.images.tree import Image

Members = list[tuple[str, dict[str, Any], bytes]]
FOLDER, LINK, HARD = {"type": tarfile.DIRTYPE}, {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}


def tar(members: Members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, fields, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_600_000_000
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def shown(layers: list[Image]) -> dict[str, bytes | None]:
    """Path -> content of what a stack shows, None for folders."""
    return {
        os.fsdecode(b"/".join(path)): b"".join(file.image.content(file.entry))
        if stat.S_ISREG(file.entry.mode)
        else None
        for path, file in seen(layers).items()
        if path
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", tmp_path / "local", mount=False)


def packed(store: Store, add: Any) -> str:
    def build(writer: Writer) -> None:
        add(writer)
        writer.finish()

    return store.add(build)


def layout(
    folder: Path, layers: list[bytes], architecture: str | None = None, config: dict[str, Any] | None = None
) -> Path:
    """An image in OCI's layout, as other tools write it."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": f"sha256:{digest}", "size": len(data)}

    described_layers = [blob(gzip.compress(layer, mtime=0), "layer.v1.tar+gzip") for layer in layers]
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps({"os": "linux", "config": config or {}}).encode(), "config.v1+json"),
        "layers": described_layers,
    }
    entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    if architecture:
        entry["platform"] = {"architecture": architecture, "os": "linux"}
    inner = blob(json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(), "index.v1+json")
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [inner]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


BOTTOM: Members = [
    ("./", {**FOLDER, "mode": 0o755}, b""),
    ("./etc", {**FOLDER, "mode": 0o755}, b""),
    ("./etc/passwd", {"uid": 0, "gid": 42, "mode": 0o640}, b"root"),
    ("./usr/bin/su", {"mode": 0o4755}, b"ELF"),
    ("./usr/bin/also", {**HARD, "linkname": "./usr/bin/su"}, b""),
    ("./bin", {**LINK, "linkname": "usr/bin"}, b""),
    ("./dev/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}, b""),
    ("./old/a", {}, b"a"),
    ("./old/b", {}, b"b"),
    ("./gone", {}, b"gone"),
]
TOP: Members = [
    ("old", {**FOLDER, "mode": 0o700}, b""),
    ("old/c", {}, b"c"),
    ("old/.wh..wh..opq", {}, b""),
    (".wh.gone", {}, b""),
    ("etc/.wh.nothing", {}, b""),
]


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_an_oci_image_is_taken_in(store: Store, tmp_path: Path, form: str) -> None:
    source = layout(tmp_path / "oci", [tar(BOTTOM), tar(TOP)], config={"Env": ["A=b"], "WorkingDir": "/w"})
    if form == "tar":
        whole = tmp_path / "image.tar"
        with tarfile.open(whole, "w") as archive:
            archive.add(source, ".")
        source = whole
    reference = import_image(store, source, "other")
    assert json.loads(reference.note["config"]) == {"Env": ["A=b"], "WorkingDir": "/w"}
    bottom, top = (store.tree(digest) for digest in reference.layers)
    files = shown([bottom, top])
    assert files == {
        "bin": None, "etc": None, "etc/passwd": b"root", "old": None, "old/c": b"c",
        "usr": None, "usr/bin": None, "usr/bin/su": b"ELF", "usr/bin/also": b"ELF",
    }  # fmt: skip
    su, passwd = bottom.find((b"usr", b"bin", b"su")), bottom.find((b"etc", b"passwd"))
    assert su is not None and su.attributes.mode == 0o755 and su.links == 2, "set-id bits are dropped"
    assert passwd is not None and (passwd.attributes.gid, passwd.attributes.mode) == (42, 0o640)
    assert bottom.find((b"dev", b"null")) is None
    old, gone = top.find((b"old",)), top.find((b"gone",))
    assert old is not None and old.is_opaque and old.attributes.mode == 0o700
    assert gone is not None and gone.is_whiteout


def test_export_and_import_give_the_same_layers(store: Store, tmp_path: Path) -> None:
    first = import_image(store, layout(tmp_path / "oci", [tar(BOTTOM), tar(TOP)]), "one")
    export_image(store, "one", tmp_path / "one.tar")
    export_image(store, "one", tmp_path / "again.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "again.tar").read_bytes()
    assert import_image(store, tmp_path / "one.tar", "two").layers == first.layers
    with tarfile.open(tmp_path / "one.tar") as archive:
        index = json.load(archive.extractfile("index.json"))  # type: ignore[arg-type]
        names = archive.getnames()
    assert index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] == "one"
    assert sorted(names)[-2:] == ["index.json", "oci-layout"] and len(names) == 6
    tree = make_tree(tmp_path / "tree")
    store.name("tree", [store.pack(tree)])
    export_image(store, "tree", tmp_path / "tree.tar")
    (unpacked,) = store.lowerdirs(import_image(store, tmp_path / "tree.tar", "back").layers)
    assert described(unpacked, times=False) == described(tree, times=False)
    store.release()
    assert not list(tmp_path.glob(".rorqual-*"))


def test_a_plain_tar_is_taken_in(store: Store, tmp_path: Path) -> None:
    (tmp_path / "root.tar.gz").write_bytes(gzip.compress(tar(BOTTOM)))
    (digest,) = import_image(store, tmp_path / "root.tar.gz", "root").layers
    assert shown([store.tree(digest)])["etc/passwd"] == b"root"


def test_images_that_cannot_be_are_refused(store: Store, tmp_path: Path) -> None:
    good = layout(tmp_path / "good", [tar(BOTTOM)])
    blob = max((good / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[50] ^= 1
    blob.write_bytes(data)
    cases: list[tuple[Path, str]] = [
        (good, "damaged: its content has another digest"),
        (layout(tmp_path / "arm", [tar(BOTTOM)], architecture="m68k"), "the image is for m68k, and this machine is"),
        (layout(tmp_path / "up", [tar([("../../etc/x", {}, b"x")])]), "no path may have"),
        (layout(tmp_path / "absolute", [tar([("/etc/x", {}, b"x")])]), "absolute path"),
        (layout(tmp_path / "owner", [tar([("x", {"uid": 70_000}, b"x")])]), "belongs to id 70000"),
        (layout(tmp_path / "hard", [tar([("x", {**HARD, "linkname": "../y"}, b"")])]), "no file of this layer"),
        (layout(tmp_path / "whiteout", [tar([(".wh...", {}, b"")])]), "no path that a layer can have"),
        (tmp_path / "nothing", "could not be read"),
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello " * 200)
    cases += [(tmp_path / "empty", "index.json cannot be read"), (tmp_path / "text", "no tar archive")]
    for number, (source, why) in enumerate(cases):
        with pytest.raises(SandboxError, match=why):
            import_image(store, source, f"x{number}")
        assert store.reference(f"x{number}") is None


def test_a_difference_turns_one_tree_into_the_other(store: Store, tmp_path: Path) -> None:
    lower = make_tree(tmp_path / "lower")
    upper = make_tree(tmp_path / "upper")
    (upper / "etc/passwd").write_text("changed")
    (upper / "usr/lib/f4096").unlink()
    (upper / "usr/lib/deep").rename(upper / "usr/lib/moved")
    (upper / "etc/link").unlink()
    (upper / "etc/link").mkdir()
    (upper / "etc/link/inside").write_text("x")
    (upper / "odd \n name" / os.fsdecode(b"\xff\xfe")).unlink()
    (upper / "odd \n name").rmdir()
    (upper / "odd \n name").write_text("a file now")
    (upper / "usr/bin/third").hardlink_to(upper / "usr/bin/tool")
    one, two = store.tree(store.pack(lower)), store.tree(store.pack(upper))
    difference = store.tree(packed(store, lambda writer: add_difference(writer, [one], two)))
    assert shown([one, difference]) == shown([two])
    touched = {b"/".join(entry.path).decode() for entry in difference.entries() if not stat.S_ISDIR(entry.mode)}
    assert touched == {
        "etc/passwd", "usr/lib/f4096", "usr/lib/deep", "usr/lib/moved/absolute", "etc/link/inside", "odd \n name",
        "usr/bin/tool", "usr/bin/same", "usr/bin/third",
    }  # fmt: skip
    nothing = store.tree(packed(store, lambda writer: add_difference(writer, [one], one)))
    assert [entry.path for entry in nothing.entries() if not stat.S_ISDIR(entry.mode)] == []


def test_merged_layers_show_and_hide_the_same(store: Store, tmp_path: Path) -> None:
    below: Members = [("gone", {}, b"older"), ("old/z", {}, b"z"), ("kept", {}, b"k"), ("etc/nothing", {}, b"n")]
    (tmp_path / "below.tar").write_bytes(tar(below))
    (ground,) = import_image(store, tmp_path / "below.tar", "below").layers
    layers = import_image(store, layout(tmp_path / "oci", [tar(BOTTOM), tar(TOP)]), "stack").layers
    images = [store.tree(digest) for digest in layers]
    one = store.tree(packed(store, lambda writer: add_merged(writer, images)))
    assert shown([store.tree(ground), one]) == shown([store.tree(ground), *images])
    assert shown([one]) == shown(images)


BUILDER = """
import os, shutil, sys
sys.stderr.write("I: fetching\\nI: done\\n")
if os.environ.get("FAIL"):
    sys.stderr.write("E: Could not resolve 'deb.example.org'\\n")
    sys.exit(100)
office = any(one.startswith("--include=") and "poppler-utils" in one for one in sys.argv)
with open(os.environ["TARS"] + ("/office.tar" if office else "/base.tar"), "rb") as file:
    shutil.copyfileobj(file, sys.stdout.buffer)
open(os.environ["TARS"] + "/asked", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for mmdebstrap that hands out prepared archives; the real one is tried in test_image_build.py."""
    import sys

    tools, tars = tmp_path / "tools", tmp_path / "tars"
    tools.mkdir()
    tars.mkdir()
    (tmp_path / "builder.py").write_text(BUILDER)
    line = f'exec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "builder.py"))} "$@"'
    (tools / "mmdebstrap").write_text(f"#!/bin/sh\n{line}\n")  # a path with a space cannot stand behind #!
    (tools / "mmdebstrap").chmod(0o755)
    (tars / "base.tar").write_bytes(tar(BOTTOM))
    (tars / "office.tar").write_bytes(tar([*BOTTOM[:-1], ("./usr/bin/pdftotext", {}, b"pdf")]))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("TARS", str(tars))
    monkeypatch.setattr(base, "_mode", lambda: "root")
    return tars


def test_a_base_and_a_toolkit_over_it_are_built(store: Store, builder: Path) -> None:
    said: list[str] = []
    reference = base.build_base(store, "debian", "bookworm", toolkits=["office"], progress=said.append)
    bottom, top = (store.tree(digest) for digest in reference.layers)
    assert {entry.path for entry in top.entries() if not stat.S_ISDIR(entry.mode)} == {
        (b"gone",), (b"usr", b"bin", b"pdftotext"),
    }  # fmt: skip
    assert shown([bottom, top])["usr/bin/pdftotext"] == b"pdf" and "gone" not in shown([bottom, top])
    assert [store.layer(digest).kind for digest in reference.layers] == ["base", "toolkit"]
    assert said.count("I: done") == 2 and said[0].startswith("building bookworm with bash")
    first, second = (builder / "asked").read_text().splitlines()
    assert "--include=bash,coreutils" in first and "poppler-utils" in second and "python3-pypdf," in second
    assert "python3-pypdf2" in base._packages("office", "jammy")
    assert base.build_base(store, "again", "bookworm").layers == reference.layers[:1]


def test_a_builder_that_fails_says_why_and_leaves_nothing(
    store: Store, builder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SandboxError, match="no toolkit 'games'; there are: office"):
        base.build_base(store, "x", toolkits=["games"])
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(
        SandboxError, match=r"(?s)ended with 100:.*Could not resolve.*is the network there.*image import"
    ):
        base.build_base(store, "x", "bookworm")
    monkeypatch.delenv("FAIL")
    (builder / "base.tar").write_bytes(tar([("../x", {}, b"x")]))
    with pytest.raises(SandboxError, match="no path may have"):
        base.build_base(store, "x", "bookworm")
    assert list(store.layers()) == [] and store.references() == []
    monkeypatch.setattr(base, "_mode", lambda: None)
    with pytest.raises(SandboxError, match="no image can be built here: .*newuidmap"):
        base.build_base(store, "x", "bookworm")


# --- collecting


def small(store: Store, tmp_path: Path, text: str) -> str:
    folder = tmp_path / f"tree-{text}"
    folder.mkdir()
    (folder / "file").write_text(text)
    return store.pack(folder)


def sandbox(home: Path, name: str, record: dict[str, Any]) -> Path:
    folder = home / "sandboxes" / name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(record))
    return folder


def test_only_what_nothing_needs_is_collected(store: Store, tmp_path: Path) -> None:
    home = tmp_path / "home"
    digests = {
        name: small(store, tmp_path, name)
        for name in ("image", "named", "used", "loose", "owned", "dead", "open", "closed", "listed")
    }
    store.name("image", [digests["image"]])
    alive = {"id": "alive", "spec": {"image": "image", "layers": [digests["used"]]}, "running": {"extra": {"uid": 5}}}
    folder = sandbox(home, "alive", alive)
    for name, owner, keep in (
        ("named", "gone", True), ("owned", "alive", False), ("dead", "gone", False), ("open", "gone", False),
        ("closed", "gone", False), ("listed", "gone", False),
    ):  # fmt: skip
        store.name(f"snap-{name}", [digests["image"], digests[name]], kind="snapshot", owner=owner, keep=keep)
    with Journal(tmp_path / "journal") as journal:
        for number, name in enumerate(("open", "closed")):
            journal.append(Request(trajectory=name, request=number))
            journal.append(EnvSnapshot(f"s{number}", f"snap-{name}", "disk", 1, number))
        journal.append(EnvSnapshot("s2", digests["listed"], "disk", 1))  # of no request: any open one may need it
        journal.append(Close(request=1, stop_reason="end"))
        journal.commit()

    def run(**how: Any) -> set[str]:
        done = collect(store, home=home, journals=[tmp_path / "journal"], **how)
        return {name for name, digest in digests.items() if digest in done.layers}

    assert run() == set() and len(store.references()) == 7, "all is young"
    assert run(grace_s=0, dry_run=True) == {"loose", "dead", "closed"}
    assert len(list(store.layers())) == len(digests), "a dry run removes nothing"
    assert run(grace_s=0) == {"loose", "dead", "closed"}
    assert {one.name for one in store.references()} == {"image", "snap-named", "snap-owned", "snap-open", "snap-listed"}
    for name in ("image", "named", "used", "owned", "open", "listed"):
        store.reader(digests[name]).verify()
    assert run(grace_s=0) == set()
    (folder / "spec.json").unlink()
    with Journal(tmp_path / "journal") as journal:
        journal.append(Close(request=0, stop_reason="end"))
        journal.commit()
    assert run(grace_s=0) == {"used", "owned", "open", "listed"}
    assert {one.name for one in store.references()} == {"image", "snap-named"}


def test_logs_protect_their_snapshots_without_being_named(store: Store, tmp_path: Path) -> None:
    home = tmp_path / "home"
    digests = [small(store, tmp_path, name) for name in ("agent", "registered")]
    places = [home / "agents" / "run-1" / "journal", tmp_path / "elsewhere" / "journal"]
    for number, (digest, place) in enumerate(zip(digests, places, strict=True)):
        store.name(f"s{number}", [digest], kind="snapshot", owner="gone", keep=False)
        place.parent.mkdir(parents=True)
        with Journal(place) as journal:
            journal.append(Request(trajectory="t", request=1))
            journal.append(EnvSnapshot("box", f"s{number}", "disk", 1, 1))
            journal.commit()
    store.protect(places[1])
    assert collect(store, home=home, grace_s=0).layers == []
    for place in places:
        with Journal(place) as journal:
            journal.append(Close(request=1, stop_reason="end"))
            journal.commit()
    note = next((store.folder / "logs").iterdir())
    told = json.loads(note.read_text())
    note.write_text(json.dumps({**told, "path": "/nowhere/at/all", "machine": "another"}))
    with pytest.raises(SandboxError, match="on machine another is a rollout log"):
        collect(store, home=home, grace_s=0)
    note.write_text(json.dumps({**told, "path": "/nowhere/at/all"}))
    assert sorted(collect(store, home=home, grace_s=0).layers) == sorted(digests)


def test_a_long_stack_is_merged_and_shows_the_same(store: Store, tmp_path: Path) -> None:
    layers = [store.pack(make_tree(tmp_path / "tree"), kind="base")]
    for number in range(12):
        members: Members = [(f"f{number}", {}, b"%d" % number), ("etc/counter", {}, b"%d" % number)]
        members += [(f".wh.f{number - 2}", {}, b"")] if number > 1 else []
        archive = io.BytesIO(tar(members))
        layers.append(packed(store, lambda writer, archive=archive: add_tar(writer, archive)))
    assert store.collapsed(layers) == layers
    short = store.collapsed(layers, most=10)
    assert len(short) == 2 and short[0] == layers[0]
    assert shown([store.tree(digest) for digest in short]) == shown([store.tree(digest) for digest in layers])


def test_nothing_is_collected_on_a_guess(store: Store, tmp_path: Path) -> None:
    digest = small(store, tmp_path, "loose")
    home = tmp_path / "home"
    folder = sandbox(home, "torn", {})
    (folder / "spec.json").write_text('{"id": "to')
    with pytest.raises(SandboxError, match=r"spec\.json cannot be read"):
        collect(store, home=home, grace_s=0)
    (folder / "spec.json").unlink()
    with pytest.raises((SandboxError, JournalError)):
        collect(store, home=home, journals=[tmp_path / "no-journal"], grace_s=0)
    (store.folder / "names").mkdir()
    (store.folder / "names/bad.json").write_text("{")
    with pytest.raises(SandboxError, match="the name 'bad'"):
        collect(store, home=home, grace_s=0)
    (store.folder / "names/bad.json").unlink()
    assert store.layer(digest).digest == digest
    assert collect(store, home=home, grace_s=0).layers == [digest]
    assert not [path for path in (store.folder / "objects").rglob("*") if path.is_file()]


def test_what_is_stored_again_while_it_is_collected_stays(store: Store, tmp_path: Path) -> None:
    digest = small(store, tmp_path, "twice")
    long_ago = time.time() - 10_000
    for path in (store.folder / "objects" / digest[:2]).iterdir():
        os.utime(path, (long_ago, long_ago))
    before = time.time() - 100
    assert list(store.collectable(set(), before)) == [digest]
    assert store.pack(tmp_path / "tree-twice") == digest
    assert store.remove_if_old(digest, before) == 0
    store.reader(digest).verify()


def test_half_written_files_of_the_living_stay(store: Store, tmp_path: Path) -> None:
    with store.objects.temporary() as file:
        file.write(b"at work")
        (store.folder / "tmp" / "dead").write_text("its writer was killed")
        done = collect(store, home=tmp_path, grace_s=0)
        assert done.temporary == 1
        assert [path.name for path in (store.folder / "tmp").iterdir()] == [Path(file.name).name]


# --- the command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["sandbox", "image", *words])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


def test_the_command(
    tmp_path: Path, builder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    assert "no images in" in run(capsys, "list")[1]
    code, out = run(capsys, "build", "deb", "--suite", "bookworm", "--toolkit", "office")
    assert code == 0 and "deb: 2 layer(s)" in out and "I: fetching" in out
    (tmp_path / "root.tar").write_bytes(tar(BOTTOM))
    made = json.loads(run(capsys, "import", str(tmp_path / "root.tar"), "plain", "--json")[1])
    assert made["name"] == "plain" and len(made["layers"]) == 1
    assert [one["name"] for one in json.loads(run(capsys, "list", "--json")[1])] == ["deb", "plain"]
    code, out = run(capsys, "export", "plain", str(tmp_path / "out.tar"))
    assert code == 0 and (tmp_path / "out.tar").stat().st_size > 1000
    assert run(capsys, "remove", "plain") == (0, "plain is gone; `image gc` frees its layers\n")
    assert json.loads(run(capsys, "gc", "--grace", "0", "--json")[1])["layers"] == []
    assert run(capsys, "remove", "deb")[0] == 0
    assert len(json.loads(run(capsys, "gc", "--grace", "0", "--dry-run", "--json")[1])["layers"]) == 2
    assert "freed" in run(capsys, "gc", "--grace", "0")[1]
    for words, why in (
        (["remove", "deb"], "no image 'deb'"),
        (["build"], "Write: rorqual sandbox image build NAME"),
        (["list", "--suite", "x"], "belong to `image build`"),
        (["list", "--dry-run"], "belong to `image gc`"),
        (["list", "--grace", "3600"], "--grace and --dry-run belong to `image gc`, not to list"),
        (["remove", "plain", "--grace", "0"], "belong to `image gc`, not to remove"),
        (["import", str(tmp_path / "none"), "x"], "could not be read"),
    ):
        code, out = run(capsys, *words)
        assert code in (1, 2) and why in out
