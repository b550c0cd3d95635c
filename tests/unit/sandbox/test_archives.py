"""S4 and S5 of the sandbox's list: paths that lead outside, link races, device nodes; archives that explode."""

import bz2
import gzip
import io
import itertools
import lzma
import os
import stat
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from full import often
from hypothesis import given, settings
from hypothesis import strategies as st
from little_tree import described

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import PolicyRejected
from rorqual.sandbox.images import beneath
from rorqual.sandbox.images.archive import create, extract
from rorqual.sandbox.images.beneath import open_beneath
from rorqual.sandbox.images.tar import ArchiveLimits, Reader


def tar(*members: tuple[str, dict[str, object], bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of (name, fields of its TarInfo, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, fields, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "inside" / "target"
    folder.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("untouched")
    return folder


def untouched(tmp_path: Path) -> bool:
    """Whether nothing happened beside the target folder."""
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "target" not in path.parts[-1]}
    beside = {name for name in names if not name.startswith("inside/target/")}
    return beside == {"inside", "outside", "outside/file"} and (tmp_path / "outside/file").read_text() == "untouched"


LINK, HARD, CHAR, BLOCK, FIFO = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
HOSTILE: dict[str, tuple[list[tuple[str, dict[str, object], bytes]], str]] = {
    "absolute": ([("/etc/cron.d/x", {}, b"x")], "absolute path"),
    "up": ([("../../outside/file", {}, b"x")], "no path may have"),
    "up in the middle": ([("a/../../../outside/file", {}, b"x")], "no path may have"),
    "through a link": (
        [("a", {"type": LINK, "linkname": "../../outside"}, b""), ("a/file", {}, b"x")],
        "symbolic link",
    ),
    "through an absolute link": ([("a", {"type": LINK, "linkname": "/tmp"}, b""), ("a/x", {}, b"x")], "symbolic link"),
    "folder through a link": (
        [("a", {"type": LINK, "linkname": "../../outside"}, b""), ("a/b", {"type": tarfile.DIRTYPE}, b"")],
        "symbolic link",
    ),
    "hard link up": ([("a", {"type": HARD, "linkname": "../../outside/file"}, b"")], "no path may have"),
    "hard link absolute": ([("a", {"type": HARD, "linkname": "/etc/passwd"}, b"")], "absolute path"),
    "hard link through a link": (
        [
            ("a", {"type": LINK, "linkname": "../../outside"}, b""),
            ("b", {"type": HARD, "linkname": "a/file"}, b""),
        ],
        "symbolic link",
    ),
    "hard link to a link": (
        [
            ("a", {"type": LINK, "linkname": "../../outside/file"}, b""),
            ("b", {"type": HARD, "linkname": "a"}, b""),
        ],
        "symbolic link|no plain file",
    ),
    "character device": ([("null", {"type": CHAR, "devmajor": 1, "devminor": 3}, b"")], "device"),
    "block device": ([("disk", {"type": BLOCK, "devmajor": 8, "devminor": 0}, b"")], "device"),
    "fifo": ([("pipe", {"type": FIFO}, b"")], "device"),
    "set-uid": ([("su", {"mode": 0o4755}, b"x")], "set-id"),
    "set-gid": ([("sg", {"mode": 0o2755}, b"x")], "set-id"),
    "file over folder": ([("a", {"type": tarfile.DIRTYPE}, b""), ("a", {}, b"x")], "folder there already"),
    "no name": ([("", {}, b"x")], "without a name"),
}


@pytest.mark.parametrize("quarantine", [False, True])
@pytest.mark.parametrize("case", HOSTILE)
def test_s4_what_leads_outside_is_refused(case: str, quarantine: bool, target: Path, tmp_path: Path) -> None:
    members, why = HOSTILE[case]
    if quarantine and "link" in case and case != "hard link up":
        why += "|.*"  # a link that leads outside is left out there, and what needs it fails in another way
    with pytest.raises(SandboxError, match=why):
        extract(io.BytesIO(tar(("first", {}, b"1"), *members)), target, quarantine=quarantine)
        raise SandboxError("nothing was refused") if not quarantine else SandboxError("taken without the link")
    assert untouched(tmp_path)
    assert (target / "first").read_bytes() == b"1", "what came before stays"
    assert not [path for path in target.rglob("*") if path.name.startswith(".rorqual-")]


def test_s4_a_quarantine_has_nothing_to_run_or_to_follow(target: Path) -> None:
    data = tar(
        ("bin", {"type": tarfile.DIRTYPE, "mode": 0o777}, b""),
        ("bin/run", {"mode": 0o777}, b"#!/bin/sh\n"),
        ("bin/good", {"type": LINK, "linkname": "run"}, b""),
        ("bin/fine", {"type": LINK, "linkname": "../bin/run"}, b""),
        ("bin/bad", {"type": LINK, "linkname": "../../run"}, b""),
        ("bad", {"type": LINK, "linkname": "/etc/shadow"}, b""),
    )
    report = extract(io.BytesIO(data), target, quarantine=True)
    assert report.skipped == ["'bin/bad'", "'bad'"]
    modes = {str(path.relative_to(target)): stat.S_IMODE(path.lstat().st_mode) for path in target.rglob("*")}
    assert modes.pop("bin/good") and modes.pop("bin/fine")
    assert modes == {"bin": 0o700, "bin/run": 0o600}


def test_links_are_kept_and_never_followed(target: Path, tmp_path: Path) -> None:
    data = tar(
        ("a", {"type": LINK, "linkname": "../../outside/file"}, b""),
        ("f", {}, b"1"),
        ("h", {"type": HARD, "linkname": "f"}, b""),
    )
    assert extract(io.BytesIO(data), target).entries == 3
    assert os.readlink(target / "a") == "../../outside/file"
    assert (target / "h").samefile(target / "f")
    extract(io.BytesIO(tar(("a", {}, b"replaced"))), target)
    assert not (target / "a").is_symlink() and (target / "a").read_bytes() == b"replaced"
    assert untouched(tmp_path)


@contextmanager
def swapping(change: Callable[[], None]) -> Iterator[None]:
    """Something else works on the same folder all the time."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            change()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "step by step"])
def test_s4_a_link_that_won_its_race_is_not_followed(
    openat2: bool, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands where a folder was looked at a moment ago."""
    monkeypatch.setattr(beneath, "_missing", not openat2)
    (tmp_path / "outside/deeper").mkdir()
    (target / "door").symlink_to(tmp_path / "outside")
    folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(SandboxError, match="symbolic link"):
            beneath.open_beneath(folder, (b"door", b"file"), os.O_RDONLY)
        with pytest.raises(SandboxError, match="symbolic link"):
            beneath.open_folder(folder, (b"door", b"deeper"))
    finally:
        os.close(folder)


@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "step by step"])
def test_s4_link_races_lead_nowhere(
    openat2: bool, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the target is exchanged for a link outside again and again while archives are unpacked into it."""
    monkeypatch.setattr(beneath, "_missing", not openat2)
    data = tar(("door/file", {}, b"stolen"), ("door/deeper/file", {}, b"stolen"))
    door, counter = target / "door", itertools.count()
    (tmp_path / "outside/deeper").mkdir()
    refused = fine = 0

    def change() -> None:
        with suppress(OSError):
            os.rename(door, target / f"real{next(counter)}")
        with suppress(OSError):
            os.symlink(tmp_path / "outside", door)
            time.sleep(0)
            os.unlink(door)

    with swapping(change):
        for _ in range(often(150, 1000)):
            try:
                extract(io.BytesIO(data), target)
                fine += 1
            except SandboxError:
                refused += 1
    assert refused > 0, "the race never met an archive"
    assert (tmp_path / "outside/file").read_text() == "untouched"
    assert list((tmp_path / "outside/deeper").iterdir()) == []
    assert {path.name for path in (tmp_path / "outside").iterdir()} == {"file", "deeper"}


def test_s4_races_while_packing_bring_nothing_in(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("SECRET")
    source = tmp_path / "source"
    source.mkdir()
    door, other, link = source / "door", tmp_path / "other", tmp_path / "link"
    door.mkdir()
    (door / "key").write_text("public")
    (source / "standing").symlink_to(secret)  # as one that won every race

    def change() -> None:
        os.rename(door, other)
        os.symlink(secret, door)
        os.unlink(door)
        os.rename(other, door)

    with swapping(change):
        for _ in range(often(100, 1000)):
            out = io.BytesIO()
            with suppress(SandboxError, OSError):
                create(source, out)
            assert b"SECRET" not in out.getvalue()
    assert not link.exists()


@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "step by step"])
def test_paths_are_opened_beneath_a_folder(openat2: bool, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beneath, "_missing", not openat2)
    (target / "a/b").mkdir(parents=True)
    (target / "a/b/f").write_text("x")
    os.symlink("f", target / "a/b/l")
    os.symlink("b", target / "a/c")
    folder = os.open(target, os.O_RDONLY)
    try:
        os.close(open_beneath(folder, (b"a", b"b", b"f"), os.O_RDONLY))
        os.close(open_beneath(folder, (), os.O_RDONLY | os.O_DIRECTORY))
        for path in ((b"a", b"b", b"l"), (b"a", b"c", b"f"), (b"a", b"c")):
            flags = os.O_RDONLY | (os.O_DIRECTORY if path[-1] == b"c" else 0)
            with pytest.raises(PolicyRejected, match="symbolic link"):
                os.close(open_beneath(folder, path, flags))
        for path in ((b"..",), (b"a", b"..", b"a"), (b"",), (b"a/b",), (b"a\0",), (b".",)):
            with pytest.raises(PolicyRejected, match="no path may have"):
                open_beneath(folder, path, os.O_RDONLY)
        with pytest.raises(FileNotFoundError):
            open_beneath(folder, (b"a", b"none"), os.O_RDONLY)
    finally:
        os.close(folder)


# --- S5


def bomb(megabytes: int) -> bytes:
    return tar(("zeros", {}, bytes(megabytes << 20)))


@pytest.mark.parametrize("squeeze", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_s5_high_ratio(squeeze: Callable[[bytes], bytes], target: Path) -> None:
    packed = squeeze(bomb(32))
    assert len(packed) < 40_000
    begun = time.monotonic()
    with pytest.raises(PolicyRejected, match=r"unpack to more than \d+; beyond the first MiB 100 to 1"):
        extract(io.BytesIO(packed), target)
    assert time.monotonic() - begun < 20
    assert list(target.iterdir()) == [], "it was stopped while it streamed"
    honest = squeeze(tar(("words", {}, b"".join(b"%d words and more\n" % i for i in range(100_000)))))
    assert extract(io.BytesIO(honest), target).content_bytes > 1 << 20


def test_s5_packed_twice(target: Path) -> None:
    noise = tar(("noise", {}, os.urandom(5000)))
    for data in (gzip.compress(gzip.compress(noise)), gzip.compress(lzma.compress(noise))):
        with pytest.raises(PolicyRejected, match="packed twice is not unpacked twice"):
            extract(io.BytesIO(data), target)
    inner = tar(("deep/inner.tar", {}, tar(("x", {}, b"x"))))
    extract(io.BytesIO(inner), target)
    assert [str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()] == ["deep/inner.tar"]


def test_s5_many_entries(target: Path) -> None:
    data = tar(*[(f"d/{i}", {}, b"") for i in range(120)])
    with pytest.raises(PolicyRejected, match="more than 100 entries"):
        extract(io.BytesIO(data), target, ArchiveLimits(entries=100))
    assert len(list((target / "d").iterdir())) == 100
    headers = tar(*[("x", {"type": tarfile.XHDTYPE}, b"11 path=ab\n") for _ in range(220)])
    with pytest.raises(PolicyRejected, match="more than 200 extended headers"):
        extract(io.BytesIO(headers), target, ArchiveLimits(entries=100))
    assert ArchiveLimits().entries == 50_000 and ArchiveLimits().ratio == 100


def test_s5_sizes_count_before_they_are_read(target: Path) -> None:
    huge = tarfile.TarInfo("huge")
    huge.size = 1 << 40
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with pytest.raises(PolicyRejected, match="1099511627776 bytes"):
            extract(io.BytesIO(huge.tobuf(format) + bytes(100)), target)
    with pytest.raises(PolicyRejected, match="3000 in all are allowed"):
        extract(
            io.BytesIO(tar(*[(f"{i}", {}, bytes(1000)) for i in range(4)])), target, ArchiveLimits(total_bytes=3000)
        )
    assert len(list(target.iterdir())) == 3


def test_s5_sparse(target: Path) -> None:
    info = tarfile.TarInfo("sparse")
    info.type = tarfile.GNUTYPE_SPARSE
    info.size = 512
    with pytest.raises(PolicyRejected, match="sparse"):
        extract(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)), target)
    pax = tar(
        ("GNUSparseFile.0/x", {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.realsize": "1000000000"}}, b"0\n")
    )
    with pytest.raises(PolicyRejected, match="sparse"):
        extract(io.BytesIO(pax), target)
    source = target.parent / "source"
    source.mkdir()
    with open(source / "holes", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PolicyRejected, match="1099511627776 bytes"):
        create(source, io.BytesIO())


def test_s5_long_names_and_deep_paths(target: Path) -> None:
    for name in ("a/" * 5000 + "x", "x" * 5000, "y" * 300):
        with pytest.raises(PolicyRejected, match="path of|no path may have"):
            extract(io.BytesIO(tar((name, {}, b"x"))), target)
    with pytest.raises(PolicyRejected, match="parts are the limit"):
        extract(io.BytesIO(tar(("a/" * 100 + "x", {}, b"x"))), target)
    lying = tarfile.TarInfo("x")
    lying.type, lying.size = tarfile.XHDTYPE, 1 << 33
    with pytest.raises(PolicyRejected, match="header of the archive has 8589934592 bytes"):
        extract(io.BytesIO(lying.tobuf(tarfile.GNU_FORMAT) + bytes(4096)), target)
    assert list(target.iterdir()) == []


def test_s5_time(target: Path) -> None:
    class Slow(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            time.sleep(0.02)
            return super().read(min(count or 0, 512))

    with pytest.raises(PolicyRejected, match="longer than 0.05 s"):
        extract(Slow(tar(("x", {}, bytes(100_000)))), target, ArchiveLimits(seconds=0.05))


def test_what_is_no_archive_is_said(target: Path) -> None:
    for data in (b"hello " * 200, os.urandom(2000), b"\x1f\x8b" + bytes(600), b"BZh9" + bytes(600)):
        with pytest.raises(PolicyRejected, match="no tar archive|compression is damaged"):
            extract(io.BytesIO(data), target)
    with pytest.raises(PolicyRejected, match="zstd"):
        extract(io.BytesIO(b"\x28\xb5\x2f\xfd" + bytes(600)), target)
    with pytest.raises(PolicyRejected, match="ends in the middle"):
        extract(io.BytesIO(tar(("x", {}, bytes(5000)))[:3000]), target)
    with pytest.raises(PolicyRejected, match="ends in the middle"):
        extract(io.BytesIO(b""), target)


@given(st.integers(0, 4095), st.binary(min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_a_damaged_header_ends_in_a_clear_error(position: int, junk: bytes) -> None:
    data = bytearray(
        tar(("dir/file-é" * 12, {"mtime": 1.5}, b"x" * 700), ("link", {"type": LINK, "linkname": "y" * 150}, b""))
    )
    data[position : position + len(junk)] = junk
    try:
        for _, content in Reader(io.BytesIO(bytes(data))):
            assert sum(map(len, content)) < 100_000
    except PolicyRejected as error:
        assert str(error).endswith((".", "xz.")) or "'" in str(error)


@pytest.mark.parametrize("squeeze", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_round_trip(squeeze: Callable[[bytes], bytes], target: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/long-").with_name("n" * 200).write_bytes(os.urandom(300_000))
    (source / os.fsdecode(b"a/\xff name\n")).write_text("odd")
    (source / "a/run").write_text("x")
    (source / "a/run").chmod(0o755)
    os.link(source / "a/run", source / "z-same")
    os.symlink("/nowhere", source / "link")
    (source / "empty").touch()
    for path in [source, *source.rglob("*")]:
        os.utime(path, (0, 1_600_000_000), follow_symlinks=False)
    out = io.BytesIO()
    report = create(source, out)
    taken = extract(io.BytesIO(squeeze(out.getvalue())), target)
    assert described(target, owners=False) == described(source, owners=False)
    assert (taken.entries, taken.content_bytes) == (report.entries, report.content_bytes)
    single = io.BytesIO()
    create(source / "a/run", single)
    extract(io.BytesIO(single.getvalue()), target / "a/b")
    assert (target / "a/b/run").read_text() == "x"


def test_gnu_archives_are_read(target: Path) -> None:
    name = "long/" * 30 + "x" * 150
    data = tar(
        (name, {"uid": 1 << 25}, b"content"), ("l", {"type": LINK, "linkname": name}, b""), format=tarfile.GNU_FORMAT
    )
    extract(io.BytesIO(data), target)
    assert (target / name).read_bytes() == b"content"
    assert os.readlink(target / "l") == name


def test_what_may_not_be_sent_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.mkfifo(source / "pipe")
    with pytest.raises(PolicyRejected, match="FIFO"):
        create(source, io.BytesIO())
    (source / "pipe").unlink()
    (source / "su").touch()
    (source / "su").chmod(0o4755)
    with pytest.raises(PolicyRejected, match="set-id"):
        create(source, io.BytesIO())
    with pytest.raises(SandboxError, match="could not be packed"):
        create(tmp_path / "nothing", io.BytesIO())
