"""Layers: what goes in comes out, in every form; damage, kills and concurrency lose and invent nothing."""

import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import overlay
import pytest
from another_user import as_ordinary_user
from full import often
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from little_tree import described, make_tree

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import SnapshotFailed
from rorqual.sandbox.images import erofs, pack
from rorqual.sandbox.images.erofs import Attributes, Writer
from rorqual.sandbox.images.local import remove_tree
from rorqual.sandbox.images.objects import CHUNK_BYTES, Layer, VerifiedReader
from rorqual.sandbox.images.store import Store
from rorqual.sandbox.images.tree import Image, image_of

needs_overlay = pytest.mark.skipif(overlay.missing() is not None, reason=f"{overlay.missing()}")


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves no mount behind either."""
    yield
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if str(tmp_path) in line.split()[4]:
            subprocess.run(["umount", line.split()[4]], check=True)


def new_store(folder: Path, mount: bool = True) -> Store:
    return Store(folder / "store", folder / "local", mount=mount)


def object_file(store: Store, digest: str) -> Path:
    return store.folder / "objects" / digest[:2] / digest


def close(store: Store) -> None:
    store.release()
    store.local.sweep(set())
    assert not any(path.is_mount() for path in store.local.folder.rglob("files"))


@pytest.mark.parametrize("mount", [True, False], ids=["mounted", "unpacked"])
def test_a_tree_comes_out_as_it_went_in(tmp_path: Path, mount: bool) -> None:
    tree = make_tree(tmp_path / "tree")
    wanted = described(tree)
    store = new_store(tmp_path, mount)
    digest = store.pack(tree)
    assert described(tree) == wanted, "packing changed what it packed"
    (folder,) = store.lowerdirs([digest])
    assert described(folder) == wanted
    assert folder.is_mount() == (mount and os.geteuid() == 0 and not (folder.parent / "unpacked").exists())
    close(store)


def test_an_ordinary_user_gets_the_same_files() -> None:
    def body(folder: Path) -> None:
        tree = make_tree(folder / "tree")
        wanted = described(tree, owners=False)
        store = new_store(folder)
        digest = store.pack(tree)
        assert described(tree, owners=False) == wanted
        (unpacked,) = store.lowerdirs([digest])
        assert described(unpacked, owners=False) == wanted
        owners = {entry.attributes.uid for entry in store.tree(digest).entries()}
        assert owners == {0}, "an ordinary user's files belong to root inside"
        secret = store.tree(digest).find((b"etc", b"empty"))
        assert secret is not None and secret.attributes.mode == 0
        store.release()
        assert store.local.sweep(set()) == [digest]
        assert not list(store.local.folder.glob("*/files"))

    as_ordinary_user(body)


def test_fsck_finds_nothing_wrong(tmp_path: Path) -> None:
    if shutil.which("fsck.erofs") is None:
        pytest.skip("erofs-utils is not installed")
    store = new_store(tmp_path)
    digest = store.pack(make_tree(tmp_path / "tree"))
    target = tmp_path / "extracted"
    command = ["fsck.erofs", f"--extract={target}", str(object_file(store, digest))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (target / "usr/lib/f4097").read_bytes() == (tmp_path / "tree/usr/lib/f4097").read_bytes()


def test_the_same_files_give_the_same_layer(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    first = store.pack(make_tree(tmp_path / "one"))
    time.sleep(0.01)
    other = make_tree(tmp_path / "other")
    os.utime(other, ns=(0, (tmp_path / "one").stat().st_mtime_ns))
    assert store.pack(other) == first
    (other / "etc/passwd").write_text("changed\n")
    assert store.pack(other) != first


names = st.binary(min_size=1, max_size=12).filter(lambda b: b not in (b".", b"..") and not set(b) & {0, 47})
trees = st.dictionaries(
    st.lists(names, min_size=1, max_size=4).map(tuple),
    st.one_of(st.binary(max_size=9000), st.just(None), st.integers(0, 5000)),
    max_size=30,
)


@given(trees)
@settings(max_examples=60, deadline=None)
def test_any_tree_is_read_back_without_mounting(tree: dict[tuple[bytes, ...], bytes | int | None]) -> None:
    file = io.BytesIO()
    writer = Writer(file)
    wanted: dict[tuple[bytes, ...], bytes | None] = {}
    for path, content in tree.items():
        if any(path[:count] in wanted and wanted[path[:count]] is not None for count in range(1, len(path))):
            continue
        if any(other[: len(path)] == path for other in wanted) and content is not None:
            continue
        if isinstance(content, int):
            content = b"\xa5" * content
        for count in range(1, len(path)):
            wanted.setdefault(path[:count], None)
        wanted[path] = content
        if content is None:
            writer.folder(path, Attributes(0o755))
        else:
            writer.regular(path, Attributes(0o644), [content[:100], content[100:]])
    size = writer.finish()
    data = file.getvalue()
    assert len(data) == size
    image = Image(lambda offset, length: data[offset : offset + length], size)
    read = {
        entry.path: b"".join(image.content(entry)) if stat.S_ISREG(entry.mode) else None
        for entry in image.entries()
        if entry.path
    }
    assert read == wanted
    for path in wanted:
        found = image.find(path)
        assert found is not None and found.path == path
    assert image.find((b"no such name here",)) is None


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_damaged_image_ends_in_an_error_and_never_hangs(flips: list[tuple[int, int]], data: st.DataObject) -> None:
    file = io.BytesIO()
    writer = Writer(file)
    for number in range(40):
        writer.regular(
            (b"folder", b"file%d" % number), Attributes(0o644, xattrs={"user.a": b"b"}), [b"x" * number * 99]
        )
    writer.symlink((b"link",), Attributes(0o777), b"folder")
    writer.sparse((b"hole",), Attributes(0o644), 1 << 30, [(0, b"begin")])
    size = writer.finish()
    bytes_ = bytearray(file.getvalue())
    meta = size - size // 3
    for position, value in flips:
        bytes_[1024 + position % 120 if position % 5 == 0 else meta + position % (size - meta)] = value
    begun = time.monotonic()
    try:
        image = Image(lambda offset, length: bytes(bytes_[offset : offset + length]), size)
        for entry in image.entries():
            if stat.S_ISLNK(entry.mode):
                image.target(entry)
            for count, (_, length, where) in enumerate(image.extents(entry)):
                if count < 100 and where is not None and length < 1 << 22:
                    image._read(where, length)
    except SandboxError as error:
        assert "layer" in str(error)
    assert time.monotonic() - begun < 30


@needs_overlay
@pytest.mark.parametrize("who", ["root", "user"])
def test_deletions_survive_snapshot_and_restore(who: str, tmp_path: Path) -> None:
    if who == "root" and os.geteuid() != 0:
        pytest.skip("runs as an ordinary user")
    if who == "root":
        deletions(tmp_path)
    else:
        as_ordinary_user(deletions)


def deletions(folder: Path) -> None:
    """Delete and replace files of two layers below, pack what was written, and stack it up again elsewhere."""
    base = folder / "base"
    for name in ("keep/a", "gone/b", "replaced/old", "replaced/deep/old2", "file"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    second = folder / "second"
    (second / "gone").mkdir(parents=True)
    (second / "gone/c").write_text("from the second layer")
    store = new_store(folder)
    layers = [store.pack(base, kind="base"), store.pack(second)]
    upper = folder / "upper"
    script = "rm -r gone file; rm -r replaced; mkdir replaced; echo new > replaced/new; echo more > keep/d; "
    before = overlay.on_overlay(store.lowerdirs(layers), upper, script + "find . | sort; cat replaced/* keep/*")
    assert "gone" not in before and "old" not in before and "./replaced/new" in before
    snapshot = store.pack(upper)
    marks = {entry.path: (entry.is_whiteout, entry.is_opaque) for entry in store.tree(snapshot).entries()}
    assert marks[(b"gone",)] == (True, False) and marks[(b"file",)] == (True, False)
    assert marks[(b"replaced",)] == (False, True)
    shutil.rmtree(upper)
    store.name("snap", [*layers, snapshot], kind="snapshot")
    store.release()
    close(store)
    again = Store(store.folder, folder / "elsewhere")
    lowers = again.lowerdirs(["snap"])
    assert overlay.on_overlay(lowers, folder / "upper2", "find . | sort; cat replaced/* keep/*") == before
    assert overlay.on_overlay(lowers[:2], folder / "upper3", "ls file gone 2>&1 || true").count("No such file") == 2
    third = folder / "upper4"
    overlay.on_overlay(lowers, third, "mkdir gone; echo back > gone/e")
    assert overlay.on_overlay(lowers, third, "ls gone") == "e\n"
    twice = again.pack(third)
    assert overlay.on_overlay(again.lowerdirs(["snap", twice]), folder / "upper5", "ls gone") == "e\n"
    again.release()
    again.local.sweep(set())
    for name in ("upper", "upper2", "upper3", "upper4", "upper5"):
        remove_tree(folder / f"{name}.work")


@needs_overlay
def test_an_overlay_outlives_what_provided_it(tmp_path: Path) -> None:
    """A client may die and a sweep run while a sandbox works on its layers."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts layers; unpacked ones stay because sandboxes name them")
    store = new_store(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/file").write_text("still here")
    digest = store.pack(tmp_path / "t")
    (lower,) = store.lowerdirs([digest])
    for name in ("up", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"userxattr,lowerdir={lower},upperdir={tmp_path}/up,workdir={tmp_path}/work"
    script = f"mount -t overlay o -o {options} {tmp_path}/merged && echo ready && read x && cat {tmp_path}/merged/file"
    child = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert store.local.sweep(set()) == [], "it is held"
    store.release()
    assert store.local.sweep({digest}) == [], "it is named"
    assert store.local.sweep(set()) == [digest]
    assert not lower.exists()
    assert child.communicate("\n")[0] == "still here"


def test_a_mount_that_nobody_holds_is_dropped(tmp_path: Path) -> None:
    store, other = new_store(tmp_path), new_store(tmp_path)
    digest = store.pack(make_tree(tmp_path / "tree"))
    (folder,) = store.lowerdirs([digest])
    if not folder.is_mount():
        pytest.skip("layers are not mounted for this user")
    lock = os.dup(store.local.locks()[0])  # as a keeper inherits it
    store.release()
    assert other.local.drop() == [] and folder.is_mount()
    os.close(lock)
    assert other.local.drop() == [digest] and not folder.exists()
    store.lowerdirs([digest])
    store.release()
    assert other.local.drop([digest]) == [digest]


def test_a_layer_is_verified_once_and_again_when_its_file_changes(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    digest = store.pack(make_tree(tmp_path / "tree"))
    for _ in range(3):
        store.objects.counters.bytes_read = 0
        store.lowerdirs([digest])
        store.release()
        store.local.drop([digest])
        assert store.objects.counters.bytes_read == 0
    os.utime(object_file(store, digest))
    store.lowerdirs([digest])
    assert store.objects.counters.bytes_read >= store.layer(digest).size
    close(store)
    assert not list(store.local.folder.glob("*.verified"))


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_byte_is_refused_with_its_chunk(tmp_path: Path, where: str) -> None:
    store = new_store(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/big").write_bytes(os.urandom(5 * CHUNK_BYTES))
    digest = store.pack(tmp_path / "t")
    file = object_file(store, digest)
    position = {"first": 0, "middle": 3 * CHUNK_BYTES + 17, "last": file.stat().st_size - 1}[where]
    chunk = position // CHUNK_BYTES
    with open(file, "r+b") as out:
        out.seek(position)
        byte = out.read(1)
        out.seek(position)
        out.write(bytes([byte[0] ^ 1]))
    for use in (lambda: store.lowerdirs([digest]), lambda: store.object_path(digest), store.reader(digest).verify):
        with pytest.raises(
            SandboxError, match=rf"layer {digest[:12]} is damaged: chunk {chunk} .bytes {chunk * CHUNK_BYTES} "
        ):
            use()
    if where == "middle":  # other chunks may be read
        assert store.reader(digest)(0, 100)
        assert store.tree(digest).find((b"big",)) is not None
    with open(file, "r+b") as out:
        out.seek(position)
        out.write(byte)
    assert store.object_path(digest) == file


def test_a_manifest_of_another_layer_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    digests = []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
        digests.append(store.pack(tmp_path / name))
    one, other = (object_file(store, digest).with_suffix(".json") for digest in digests)
    shutil.copy(other, one)
    with pytest.raises(SandboxError, match=f"it is that of layer {digests[1][:12]}"):
        store.layer(digests[0])
    one.write_text("{}")
    with pytest.raises(SandboxError, match="manifest of layer"):
        store.layer(digests[0])
    assert [layer.digest for layer in store.layers()] == [digests[1]]


def test_an_object_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    digest = store.pack(make_tree(tmp_path / "tree"))
    file = object_file(store, digest)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(SandboxError, match="damaged"):
        store.object_path(digest)
    file.unlink()
    with pytest.raises(SandboxError, match="no content"):
        store.object_path(digest)
    assert store.pack(tmp_path / "tree") == digest, "made again, it is whole again"
    assert store.object_path(digest) == file


def test_only_what_is_looked_at_is_read(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    tree = tmp_path / "tree"
    (tree / "usr/share").mkdir(parents=True)
    for number in range(40):
        (tree / f"usr/share/{number}").write_bytes(os.urandom(CHUNK_BYTES))
    (tree / "usr/tool").write_text("#!/bin/sh\n")
    digest = store.pack(tree)
    whole = store.layer(digest).size
    store.objects.counters.bytes_read = 0
    image = store.tree(digest)
    found = image.find((b"usr", b"tool"))
    assert found is not None and b"".join(image.content(found)) == b"#!/bin/sh\n"
    assert 0 < store.objects.counters.bytes_read < 0.15 * whole
    assert len(list(image.entries())) == 44
    assert store.objects.counters.bytes_read < 0.15 * whole


def test_a_remote_that_lies_delays_or_fails_is_noticed(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    digest = store.pack(make_tree(tmp_path / "tree"))
    layer = store.layer(digest)

    class Faulty:
        counters = store.objects.counters

        def __init__(self, fault: object) -> None:
            self.fault = fault

        def get_range(self, key: str, offset: int, length: int) -> bytes:
            data = store.objects.get_range(key, offset, length)
            if isinstance(self.fault, Exception):
                raise self.fault
            return data[:-1] if self.fault == "short" else data[:-1] + b"?" if self.fault == "wrong" else data

    key = f"objects/{digest[:2]}/{digest}"
    for fault in ("short", "wrong"):
        with pytest.raises(SandboxError, match="damaged: chunk 0"):
            VerifiedReader(Faulty(fault), key, layer)(1024, 10)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="gone"):
        VerifiedReader(Faulty(OSError("gone")), key, layer)(1024, 10)  # type: ignore[arg-type]
    assert VerifiedReader(Faulty(None), key, layer)(1024, 4) == b"\xe2\xe1\xf5\xe0"  # type: ignore[arg-type]


def test_a_file_that_is_almost_all_hole_stays_small(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with open(tmp_path / "t/huge", "wb") as file:
        file.write(b"begin")
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"half")
    store = new_store(tmp_path)
    digest = store.pack(tmp_path / "t")
    assert store.layer(digest).size < 40 << 20
    assert object_file(store, digest).stat().st_blocks * 512 < 40 << 20
    (folder,) = store.lowerdirs([digest])
    with open(folder / "huge", "rb") as file:
        assert os.fstat(file.fileno()).st_size == 1 << 40
        assert file.read(6) == b"begin\0"
        file.seek(1 << 39)
        assert file.read(5) == b"half\0"
    close(store)


def test_scrub_rules_leave_files_out_and_the_original_alone(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("root/.bash_history", "home/agent/.netrc", "home/agent/work.txt", "var/log/build/long.log", "etc/x"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("secret")
    (tree / "home/agent/.ssh").mkdir()
    (tree / "home/agent/.ssh/id_ed25519").write_text("key")
    before = described(tree)
    store = new_store(tmp_path)
    digest = store.pack(tree, scrub=[*pack.SCRUB, "/etc/x"])
    kept = {b"/".join(entry.path).decode() for entry in store.tree(digest).entries()}
    assert kept == {"", "root", "home", "home/agent", "home/agent/work.txt", "home/agent/.ssh", "var", "var/log", "etc"}
    assert described(tree) == before
    assert len(list(store.tree(store.pack(tree)).entries())) == len(before)


def test_owners_are_read_as_the_sandbox_sees_them(tmp_path: Path) -> None:
    tree = tmp_path / "t"
    tree.mkdir()
    (tree / "f").touch()
    mine, group = os.geteuid(), os.getegid()
    store = new_store(tmp_path)
    entry = store.tree(store.pack(tree, owners=[(mine, 1000, 1), (group, 1000, 1)])).find((b"f",))
    assert entry is not None and (entry.attributes.uid, entry.attributes.gid) == (1000, 1000)
    entry = store.tree(store.pack(tree, owners=[(mine + 1, 0, 10)])).find((b"f",))
    assert entry is not None and entry.attributes.uid == pack.NOBODY


def test_what_a_layer_cannot_keep_is_left_out_or_refused(tmp_path: Path) -> None:
    import socket

    tree = tmp_path / "t"
    tree.mkdir()
    (tree / "setuid").touch()
    (tree / "setuid").chmod(0o4755)
    link = socket.socket(socket.AF_UNIX)
    link.bind(str(tree / "socket"))
    link.close()
    store = new_store(tmp_path)
    entries = {entry.path: entry for entry in store.tree(store.pack(tree)).entries()}
    assert set(entries) == {(), (b"setuid",)}
    assert entries[(b"setuid",)].attributes.mode == 0o755
    deep = tree
    for _ in range(pack.MAX_DEPTH + 2):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with pytest.raises(SnapshotFailed, match="folders deep"):
        store.pack(tree)
    assert list((store.folder / "tmp").iterdir()) == []
    with pytest.raises(SandboxError, match="Name a folder"):
        store.pack(tmp_path / "nothing")


def test_a_file_that_changes_meanwhile_fails_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "t"
    tree.mkdir()
    (tree / "f").write_bytes(b"x" * 1000)
    pieces = pack._pieces

    def changing(file: int, size: int):  # type: ignore[no-untyped-def]
        yield from pieces(file, size)
        (tree / "f").write_bytes(b"y" * 2000)

    monkeypatch.setattr(pack, "_pieces", changing)
    store = new_store(tmp_path)
    with pytest.raises(SnapshotFailed, match="changed while"):
        store.pack(tree)
    assert list(store.layers()) == []


def test_names_stand_for_stacks(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    (tmp_path / "a").mkdir()
    digest = store.pack(tmp_path / "a")
    store.name("debian-12", [digest], note={"suite": "bookworm"})
    assert store.resolve(["debian-12", digest]) == [digest]
    assert [one.name for one in store.references()] == ["debian-12"]
    with pytest.raises(SandboxError, match=r"no image 'fedora'.*there are: debian-12.*image build fedora"):
        store.lowerdirs(["fedora"])
    with pytest.raises(SandboxError, match="no layer"):
        store.name("x", ["0" * 64])
    for bad in ("", "../x", "a/b", ".hidden", digest):
        with pytest.raises(SandboxError, match="cannot name an image"):
            store.name(bad, [digest])
        with pytest.raises(SandboxError, match="no image|no layer"):
            store.forget(bad)
    store.forget("debian-12")
    with pytest.raises(SandboxError, match="no image"):
        store.forget("debian-12")


FORK = multiprocessing.get_context("fork")  # a fresh interpreter would only cost time


def pack_and_name(folder: Path, number: int, trees: list[Path], line: Connection) -> None:
    """What a process does that stores trees one after the other."""
    store = Store(folder / "store", folder / f"local{number}")
    line.send("ready")
    digests = []
    for tree in trees:
        digests.append(store.pack(tree))
        store.name("made-" + digests[-1][:8], digests[-1:])
    line.send(digests)


def packer(folder: Path, number: int, trees: list[Path]) -> tuple[BaseProcess, Connection]:
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=pack_and_name, args=(folder, number, trees, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == "ready"
    return child, ours


def test_processes_store_the_same_and_other_layers_at_once(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"t{number}").mkdir()
        (tmp_path / f"t{number}/f").write_bytes(hashlib.sha256(b"%d" % (number // 2)).digest() * 20_000)
        os.utime(tmp_path / f"t{number}/f", ns=(0, 0))
        os.utime(tmp_path / f"t{number}", ns=(0, 0))
    trees = [tmp_path / f"t{number}" for number in range(6)]
    children = [packer(tmp_path, number, trees) for number in range(3)]
    answers = [line.recv() for _, line in children]
    for child, line in children:
        child.join()
        line.close()
        assert child.exitcode == 0
    assert answers[0] == answers[1] == answers[2]
    store = new_store(tmp_path)
    assert {layer.digest for layer in store.layers()} == set(answers[0]) and len(set(answers[0])) == 3
    assert len(store.references()) == 3
    for digest in set(answers[0]):
        store.reader(digest).verify()
    assert list((store.folder / "tmp").iterdir()) == []


def test_a_packer_killed_at_any_moment_leaves_nothing_half_made(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(os.urandom(16 << 20))
    store = new_store(tmp_path)
    killed = 0
    for number in range(often(8, 100)):
        (tree / "number").write_text(str(number))
        child, line = packer(tmp_path, number, [tree])
        time.sleep(0.01 * (number % 8))
        child.kill()
        child.join()
        line.close()
        killed += child.exitcode == -signal.SIGKILL
        for layer in store.layers():
            store.reader(layer.digest).verify()
        for reference in store.references():
            assert all(store.layer(digest) for digest in reference.layers)
    assert killed
    digest = store.pack(tree)
    store.reader(digest).verify()
    store.objects.sweep_temporary()
    assert list((store.folder / "tmp").iterdir()) == []
    present = {layer.digest for layer in store.layers()}
    for leftover in list(store.collectable(present, float("inf"))):
        store.remove_if_old(leftover, float("inf"))
    files = {path.name.removesuffix(".json") for path in (store.folder / "objects").rglob("*") if path.is_file()}
    assert files == present


def test_processes_that_need_a_layer_make_it_once(tmp_path: Path) -> None:
    store = new_store(tmp_path, mount=False)
    digest = store.pack(make_tree(tmp_path / "tree"))

    def provide(line: Connection) -> None:
        (folder,) = Store(store.folder, store.local.folder, mount=False).lowerdirs([digest])
        line.send((str(folder), len(list(folder.rglob("*"))), (folder / "etc").stat().st_ino))

    answers = []
    pairs = [FORK.Pipe() for _ in range(4)]
    children = [FORK.Process(target=provide, args=(theirs,)) for _, theirs in pairs]
    for child in children:
        child.start()
    for child, (ours, theirs) in zip(children, pairs, strict=True):
        answers.append(ours.recv())
        child.join()
        ours.close()
        theirs.close()
    assert len(set(answers)) == 1 and answers[0][1] == len(list((tmp_path / "tree").rglob("*")))
    close(store)


def test_a_layer_is_named_by_all_of_its_content() -> None:
    layer = Layer.made(10, ["00" * 32], "diff", 0.0, {})
    for other in (Layer.made(11, ["00" * 32], "diff", 0.0, {}), Layer.made(10, ["01" + "00" * 31], "diff", 0.0, {})):
        assert other.digest != layer.digest
    with pytest.raises(SandboxError, match="does not belong"):
        Layer(layer.digest, 10, ("01" * 32,))


def test_later_files_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    with open(tmp_path / "image", "w+b") as file:
        writer = Writer(file)
        writer.regular((b"a", b"b"), Attributes(0o644), [b"one"])
        writer.regular((b"a",), Attributes(0o600), [b"two"])
        writer.special((b"w",), Attributes(0), stat.S_IFCHR)
        writer.folder((b"w",), Attributes(0o755))
        writer.opaque((b"new", b"er"))
        writer.regular((b"new", b"er", b"x"), Attributes(0o644), [])
        with pytest.raises(SandboxError, match="no file of this layer"):
            writer.link((b"l",), (b"nowhere",))
        for bad in ((), (b"..",), (b"a/b",), (b"x" * 256,)):
            with pytest.raises(SandboxError, match="no path"):
                writer.regular(bad, Attributes(0o644), [])
        writer.finish()
        entries = {entry.path: entry for entry in image_of(file).entries()}
    assert set(entries) == {(), (b"a",), (b"w",), (b"new",), (b"new", b"er"), (b"new", b"er", b"x")}
    assert entries[(b"w",)].is_opaque, "a folder over a deletion hides what was deleted"
    assert entries[(b"new", b"er")].is_opaque and not entries[(b"new",)].is_opaque
    assert erofs.chunk_bytes((1 << 40) + 5) * 65536 >= (1 << 40) + 5
