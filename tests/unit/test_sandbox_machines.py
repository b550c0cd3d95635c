"""What virtual machines are made of, without one: archives, modules, disks, command lines, QMP, snapshots."""

import asyncio
import contextlib
import gzip
import json
import lzma
import shutil
import stat
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rorqual.errors import SandboxError
from rorqual.sandbox.agent.build import compiler
from rorqual.sandbox.drivers import qemu
from rorqual.sandbox.errors import SnapshotFailed, TransportError
from rorqual.sandbox.vm import kernel, qcow2, share, snapshot
from rorqual.sandbox.vm.cpio import Archive
from rorqual.sandbox.vm.firecracker_api import Api, connect_vsock
from rorqual.sandbox.vm.machine import Disk, Machine, _Places, fingerprint
from rorqual.sandbox.vm.modules import dependencies, in_order
from rorqual.sandbox.vm.qmp import QMP
from rorqual.sandbox.vm.share import NAME, Sharing, sharing
from rorqual.sandbox.vm.template import Template


def machine(folder: Path, **changes: object) -> Machine:
    files = {name: folder / name for name in ("vmlinux", "initrd", "layer", "base")}
    made = Machine(
        board="pc",
        accelerator="tcg",
        cpus=1,
        memory_mb=256,
        kernel=files["vmlinux"],
        initramfs=files["initrd"],
        layers=(files["layer"],),
        disk=Disk((files["base"],), folder / "vm" / "disk"),
        folder=folder / "vm",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


# --- initramfs


def test_an_archive_is_what_cpio_reads_and_the_same_each_time(tmp_path: Path) -> None:
    archives = []
    for order in (1, -1):
        archive = Archive()
        for name, data in [("init", b"program"), ("modules/order", b"a.ko\n")][::order]:
            archive.add_file(name, data, 0o755)
        archive.add_device("dev/console", 5, 1)
        archive.add_link("bin", "usr/bin")
        archive.add_folder("proc")
        archives.append(archive.to_bytes())
    assert archives[0] == archives[1]
    assert len(archives[0]) % 512 == 0 and archives[0].startswith(b"070701")
    if shutil.which("cpio"):
        listed = subprocess.run(["cpio", "-itv"], input=archives[0], capture_output=True, check=True).stdout.decode()
        assert "dev/console" in listed and "bin -> usr/bin" in listed and "modules/order" in listed
    names = [
        archives[0][at + 110 :].split(b"\0")[0]
        for at in range(len(archives[0]))
        if archives[0][at : at + 6] == b"070701"
    ]
    assert names == [b"bin", b"dev", b"dev/console", b"init", b"modules", b"modules/order", b"proc", b"TRAILER!!!"]


@pytest.mark.parametrize("path", ["/init", "../init", "a/../../b", "", "nul\0"])
def test_an_archive_takes_no_path_outside(path: str) -> None:
    with pytest.raises(SandboxError, match="no place in an initramfs"):
        Archive().add_file(path, b"")


# --- kernel and modules


def module(depends: str) -> bytes:
    """The least ELF file with a .modinfo section."""
    info = f"license=GPL\0depends={depends}\0name=x\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    at = 64 + len(info) + len(names)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    return head + info + names + sections


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "modules.builtin").write_text("kernel/ext4.ko\n")
    (tmp_path / "kernel" / "erofs.ko.xz").write_bytes(lzma.compress(module("lib-crc,other")))
    (tmp_path / "kernel" / "lib-crc.ko.gz").write_bytes(gzip.compress(module("")))
    (tmp_path / "kernel" / "other.ko").write_bytes(module("lib_crc"))
    names = [one.name for one in in_order(tmp_path, ("ext4", "erofs"))]
    assert names == ["lib_crc", "other", "erofs"]
    with pytest.raises(SandboxError, match="lacks the module absent"):
        in_order(tmp_path, ("absent",))
    (tmp_path / "kernel" / "lib-crc.ko.gz").write_bytes(gzip.compress(module("erofs")))
    with pytest.raises(SandboxError, match="in a ring: erofs -> lib_crc -> erofs"):
        in_order(tmp_path, ("erofs",))


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", module("x")[:200]], ids=["empty", "script", "cut"])
def test_a_damaged_module_is_named(data: bytes) -> None:
    with pytest.raises(SandboxError, match="kernel module bad is damaged"):
        dependencies(data, "bad")


@pytest.mark.parametrize(
    "packed",
    [lzma.compress(b"\x7fELF rest"), gzip.compress(b"\x7fELF rest"), lzma.compress(b"\x7fELF rest", lzma.FORMAT_ALONE)],
    ids=["xz", "gzip", "lzma"],
)
def test_a_compressed_kernel_is_taken_out_of_its_image(packed: bytes) -> None:
    image = bytearray(0x400 + len(packed))
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 0, len(packed))
    image[0x400:] = packed
    assert kernel.uncompressed(bytes(image)) == b"\x7fELF rest"
    assert kernel.uncompressed(b"\x7fELF as it is") == b"\x7fELF as it is"
    with pytest.raises(SandboxError, match="no x86 kernel"):
        kernel.uncompressed(b"MZ" + bytes(2000))
    image[0x400:0x406] = b"??????"
    with pytest.raises(SandboxError, match="compressed in an unknown way"):
        kernel.uncompressed(bytes(image))


def test_a_named_kernel_that_is_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RORQUAL_KERNEL", str(tmp_path / "absent"))
    with pytest.raises(SandboxError, match="cannot be read"):
        kernel.find()
    (tmp_path / "text").write_text("no kernel")
    monkeypatch.setenv("RORQUAL_KERNEL", str(tmp_path / "text"))
    with pytest.raises(SandboxError, match="no x86 kernel"):
        kernel.find()


# --- disks and command lines


def test_an_empty_disk_is_a_right_qcow2(tmp_path: Path) -> None:
    qcow2.write_empty(tmp_path / "disk", 3 << 30)
    assert (tmp_path / "disk").stat().st_size == 4 << 16
    if shutil.which("qemu-img"):
        told = subprocess.run(
            ["qemu-img", "check", "--output=json", str(tmp_path / "disk")], capture_output=True, check=False
        )
        assert told.returncode == 0 and json.loads(told.stdout)["check-errors"] == 0
        info = subprocess.run(
            ["qemu-img", "info", "--output=json", str(tmp_path / "disk")], capture_output=True, check=True
        )
        assert json.loads(info.stdout)["virtual-size"] == 3 << 30
    with pytest.raises(ValueError, match="whole sectors"):
        qcow2.write_empty(tmp_path / "odd", 1000)


def test_qemu_gets_nothing_that_leads_out(tmp_path: Path) -> None:
    made = machine(tmp_path)
    words = made.arguments(_Places(made, True))
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)
    assert words[words.index("-sandbox") + 1].startswith("on,") and "spawn=deny" in words[words.index("-sandbox") + 1]
    line = " ".join(words)
    for forbidden in ("-netdev", "virtfs", "fsdev", "vhost", "hostfwd", "tcp:", "-monitor", "-vnc", "usb-"):
        assert forbidden not in line
    assert str(tmp_path) not in line, "inside the walls QEMU needs no path of the host"
    chardevs = [words[at + 1] for at, word in enumerate(words) if word == "-chardev"]
    assert all(chardev.startswith("socket,") and "path=/vm/" in chardev for chardev in chardevs) and len(chardevs) == 2
    writable = [word for word in words if word.startswith("driver=file") and "read-only=off" in word]
    assert writable == ["driver=file,node-name=upperf,filename=/vm/disk,read-only=off"]
    binds = _Places(made, True).binds()
    assert binds.count("--ro-bind") == 4 and binds.count("--bind") == 1


@pytest.mark.parametrize("way", [Sharing(options=",readonly=on,rom=off"), Sharing(preload=Path("/cache/preload.so"))])
def test_memory_that_is_shared_is_only_read(tmp_path: Path, way: Sharing) -> None:
    """The file of a template is outside of the machine's folder, bound read-only, and mapped privately."""
    memory = tmp_path / "template" / NAME
    made = machine(tmp_path, memory=memory, sharing=way, incoming=True)
    place = _Places(made, True)
    words = made.arguments(place)
    backend = words[words.index("-object") + 1]
    assert backend == f"memory-backend-file,id=ram,size=256M,mem-path=/files/{NAME},share=off{way.options}"
    binds = place.binds()
    at = binds.index(str(memory))
    assert binds[at - 1 : at + 2] == ["--ro-bind", str(memory), f"/files/{NAME}"]
    preloaded = [binds[number + 2] for number, word in enumerate(binds) if word == "--setenv"]
    assert len(preloaded) == (way.preload is not None) and all(f"{way.preload}" in binds for _ in preloaded)
    boots = machine(tmp_path, memory=tmp_path / "vm" / NAME, sharing=way)
    words = boots.arguments(_Places(boots, True))
    assert words[words.index("-object") + 1] == f"memory-backend-file,id=ram,size=256M,mem-path=/vm/{NAME},share=on"
    assert boots.preload is None and "--setenv" not in _Places(boots, True).binds()


def test_how_memory_is_shared_depends_on_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dynamic, static = tmp_path / "dynamic", tmp_path / "static"
    dynamic.write_bytes(b"\x7fELF" + bytes(60) + b"/lib64/ld-linux-x86-64.so.2\0")
    static.write_bytes(b"\x7fELF" + bytes(200))
    for path in (dynamic, static):
        path.chmod(0o755)
    assert sharing(str(static), "QEMU emulator version 8.2.0") == Sharing(options=",readonly=on,rom=off")
    assert sharing(str(static), "QEMU emulator version 10.0.2 (Debian 1:10)") == Sharing(options=",readonly=on,rom=off")
    assert sharing(str(static), "QEMU emulator version 7.2.19") is None
    assert sharing(str(dynamic), "QEMU emulator version 6.2.0") is None and sharing(str(dynamic), "") is None
    if compiler() is not None:
        way = sharing(str(dynamic), "QEMU emulator version 8.1.5 (Debian)")
        assert way is not None and way.options == "" and way.preload is not None and way.preload.exists()
    monkeypatch.setenv("CC", str(tmp_path / "absent"))
    assert sharing(str(dynamic), "QEMU emulator version 7.2.1") is None, "without a compiler each loads its own"


def test_a_template_in_memory_is_not_shared(tmp_path: Path) -> None:
    kinds = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        kinds[line.split()[4]] = line.partition(" - ")[2].split()[0]
    assert share.is_in_memory(Path("/dev/shm/absent/folder")) == (kinds.get("/dev/shm", kinds.get("/dev")) == "tmpfs")
    assert not share.is_in_memory(Path("/proc/self"))


@pytest.mark.parametrize(("rate", "delays"), [(1.0, (0, 0)), (1.0, (0.2, 0)), (1.0, (0, 0.2)), (0.9, (0, 0))])
def test_a_clock_is_right_however_late_it_answers(
    monkeypatch: pytest.MonkeyPatch, rate: float, delays: tuple[float, float]
) -> None:
    assert _watched(monkeypatch, rate, delays)


@pytest.mark.parametrize("rate", [0.0, 0.3, 2.0, 40.0])
def test_a_clock_that_runs_at_another_rate_is_found(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    assert not _watched(monkeypatch, rate, (0, 0))


def _watched(monkeypatch: pytest.MonkeyPatch, rate: float, delays: tuple[float, float]) -> bool:
    """What is found of a guest's clock of this rate that answers so many seconds late; all in made-up time."""
    now = [100.0]
    late = iter(delays)

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    async def clock_ms() -> int:
        told = int(now[0] * rate * 1000)
        now[0] += next(late)
        return told

    monkeypatch.setattr(qemu, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(qemu, "asyncio", SimpleNamespace(sleep=sleep))
    return asyncio.run(qemu.keeps_time(clock_ms))


def test_a_template_that_does_not_keep_time_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    made = Template(tmp_path, {}, 1.0)
    assert not made.is_tried
    made.mark_tried()
    assert made.is_tried
    made.discard()
    assert not tmp_path.exists()
    made.mark_tried()


OPENS = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
for name in ("open", "open64", "__open_2", "__open64_2"):
    for path in sys.argv[1:3]:
        try:
            print(os.write(getattr(libc, name)(path.encode(), os.O_RDWR), b"x"))
        except OSError as error:
            print(error.strerror)
print(oct(os.fstat(libc.open(sys.argv[3].encode(), os.O_RDWR | os.O_CREAT, 0o640)).st_mode & 0o777))
"""


def test_the_preloaded_library_opens_only_that_file_for_reading(tmp_path: Path) -> None:
    library = share._built()
    if library is None:
        pytest.skip("no C compiler")
    paths = [tmp_path / name for name in (NAME, "other", "new")]
    for path in paths[:2]:
        path.write_bytes(b"content")
    words = [sys.executable, "-c", OPENS, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, env={"LD_PRELOAD": str(library)}, umask=0)
    assert done.stdout.splitlines() == ["Bad file descriptor", "1"] * 4 + ["0o640"], done.stderr
    assert [path.read_bytes() for path in paths] == [b"content", b"xontent", b""]


def test_a_path_that_could_add_options_is_refused(tmp_path: Path) -> None:
    made = machine(tmp_path, layers=(tmp_path / "a,readonly=off",))
    with pytest.raises(SandboxError, match="has a comma"):
        made.arguments(_Places(made, False))


# --- QMP


class Qemu:
    """A fake QEMU that plays a script: for each command what to send."""

    def __init__(self, answers: dict[str, list[bytes]], greeting: bytes | None = None) -> None:
        self.answers = answers
        version = (
            b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 5}, "package": ""}, "capabilities": []}}'
        )
        self.greeting = version + b"\r\n" if greeting is None else greeting
        self.commands: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.greeting)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                request = json.loads(line)
                self.commands.append(request["execute"])
                for answer in self.answers.get(request["execute"], [b'{"return": {}, "id": ID}\r\n']):
                    data = answer.replace(b"ID", str(request["id"]).encode())
                    for byte in range(0, len(data), 7):  # in pieces, as a socket may give them
                        writer.write(data[byte : byte + 7])
                        await writer.drain()
        writer.close()


async def with_qemu(folder: Path, fake: Qemu, then: object) -> object:
    server = await asyncio.start_unix_server(fake.serve, folder / "qmp")
    try:
        async with await QMP.connect(folder / "qmp", 2.0) as qmp:
            return await then(qmp)  # type: ignore[operator]
    finally:
        server.close()


def test_qmp_answers_errors_and_events(tmp_path: Path) -> None:
    fake = Qemu(
        {
            "query-status": [b'{"event": "STOP", "data": {"n": 1}}\n{"return": {"running": false}, "id": ID}\n'],
            "bad": [b'{"error": {"class": "GenericError", "desc": "no such thing"}, "id": ID}\n'],
            "late": [b'{"return": "old", "id": 99}\n', b'{"return": "new", "id": ID}\n'],
        }
    )

    async def talk(qmp: QMP) -> None:
        assert qmp.version == (7, 2, 5)
        assert await qmp.execute("query-status") == {"running": False}
        assert (await qmp.wait_for_event("STOP"))["data"] == {"n": 1}
        with pytest.raises(SandboxError, match="QEMU refused bad: no such thing"):
            await qmp.execute("bad")
        assert await qmp.execute("late") == "new"

    asyncio.run(with_qemu(tmp_path, fake, talk))
    assert fake.commands == ["qmp_capabilities", "query-status", "bad", "late"]


@pytest.mark.parametrize("greeting", [b"hello\n", b"{}\n", b"[1]\n", b"", b"x" * (2 << 20)])
def test_qmp_takes_nothing_else_for_qemu(tmp_path: Path, greeting: bytes) -> None:
    async def never(qmp: QMP) -> None:
        raise AssertionError

    class Ends(Qemu):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                writer.write(self.greeting)
                await writer.drain()
            writer.close()

    with pytest.raises(TransportError):
        asyncio.run(with_qemu(tmp_path, Ends({}, greeting), never))


def test_qmp_waits_no_longer_than_told(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="cannot be reached"):
        asyncio.run(QMP.connect(tmp_path / "absent", 0.05))


# --- full snapshots


def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[snapshot.Manifest, dict[str, str]]:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path / "home"))
    snapshot.folder().mkdir(parents=True)
    (snapshot.folder() / "state").write_bytes(b"memory" * 10_000)
    with open(tmp_path / "base", "wb") as file:
        file.truncate(8 << 20)
        file.seek(5 << 20)
        file.write(b"content")
    qcow2.write_empty(tmp_path / "top", 8 << 20)
    for name in ("vmlinux", "initrd", "layer"):
        (tmp_path / name).write_bytes(name.encode())
    here = fingerprint(machine(tmp_path), "kernel", "initramfs")
    manifest = snapshot.store(snapshot.folder() / "state", [tmp_path / "base", tmp_path / "top"], here, 8, "ab" * 32)
    return manifest, here


def test_a_full_snapshot_is_read_back_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, here = taken(tmp_path, monkeypatch)
    assert snapshot.read(manifest.id) == manifest
    snapshot.check(manifest, here)
    snapshot.verify(manifest)
    assert stat.S_IMODE((manifest.folder / "manifest.json").stat().st_mode) == 0o600
    assert all(not (manifest.folder / name).stat().st_mode & 0o222 for name in manifest.files)
    assert not list(snapshot.folder().glob(".new-*"))
    snapshot.remove(manifest.id)
    with pytest.raises(SandboxError, match="there is no full snapshot"):
        snapshot.read(manifest.id)


@pytest.mark.parametrize("field", ["qemu", "cpu", "kernel", "layers", "memory_mb", "accelerator"])
def test_another_fingerprint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    manifest, here = taken(tmp_path, monkeypatch)
    with pytest.raises(SandboxError, match=f"{field}: .* then, other now"):
        snapshot.check(manifest, {**here, field: "other"})


def test_a_damaged_file_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = taken(tmp_path, monkeypatch)
    path = manifest.folder / "disk0"
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(5 << 20)
        file.write(b"C")
    with pytest.raises(SandboxError, match="is damaged: disk0"):
        snapshot.verify(manifest)
    (manifest.folder / "state").unlink()
    with pytest.raises(SandboxError, match=r"lacks its file state|is damaged"):
        snapshot.verify(manifest)


def test_holes_do_not_change_a_digest(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.seek(300_000)
        file.write(b"x")
        file.truncate(1_000_000)
    (tmp_path / "dense").write_bytes((tmp_path / "sparse").read_bytes())
    assert snapshot.digest_of(tmp_path / "sparse") == snapshot.digest_of(tmp_path / "dense")
    (tmp_path / "longer").write_bytes((tmp_path / "sparse").read_bytes() + b"\0")
    assert snapshot.digest_of(tmp_path / "sparse") != snapshot.digest_of(tmp_path / "longer")


def test_a_snapshot_that_cannot_be_stored_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_HOME", str(tmp_path))
    with pytest.raises(SnapshotFailed, match="could not be stored"):
        snapshot.store(tmp_path / "absent", [], {}, 8, "")
    assert list(snapshot.folder().iterdir()) == []


# --- Firecracker


class Firecracker:
    """Answers as Firecracker's published API says, and writes down what it was asked."""

    def __init__(self, refuse: str | None = None) -> None:
        self.refuse = refuse
        self.asked: list[tuple[str, str, object]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readline()).decode().split()
        length = 0
        while line := (await reader.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        body = json.loads(await reader.readexactly(length)) if length else None
        self.asked.append((method, path, body))
        if path == self.refuse:
            fault = b'{"fault_message": "the kernel file cannot be opened"}'
            writer.write(
                b"HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(fault) + fault
            )
        else:
            writer.write(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n")
        writer.close()


async def boot_on(folder: Path, fake: Firecracker) -> None:
    server = await asyncio.start_unix_server(fake.serve, folder / "api")
    try:
        api = Api(folder)
        await api.boot(
            cpus=2,
            memory_mb=256,
            kernel="/files/0",
            initramfs="/files/1",
            boot_args="quiet",
            disks=[("layer0", "/files/2", True), ("upper", "/vm/disk", False)],
            vsock="/vm/vsock",
        )
        await api.set_state(paused=True)
    finally:
        server.close()


def test_firecracker_is_asked_in_order(tmp_path: Path) -> None:
    fake = Firecracker()
    asyncio.run(boot_on(tmp_path, fake))
    assert [(method, path) for method, path, _ in fake.asked] == [
        ("PUT", "/machine-config"),
        ("PUT", "/boot-source"),
        ("PUT", "/drives/layer0"),
        ("PUT", "/drives/upper"),
        ("PUT", "/vsock"),
        ("PUT", "/entropy"),
        ("PUT", "/actions"),
        ("PATCH", "/vm"),
    ]
    bodies = {path: body for _, path, body in fake.asked}
    assert bodies["/machine-config"] == {"vcpu_count": 2, "mem_size_mib": 256, "smt": False, "track_dirty_pages": False}
    assert bodies["/drives/layer0"] == {
        "drive_id": "layer0",
        "path_on_host": "/files/2",
        "is_root_device": False,
        "is_read_only": True,
    }
    assert bodies["/vsock"] == {"guest_cid": 3, "uds_path": "/vm/vsock"}
    assert bodies["/actions"] == {"action_type": "InstanceStart"} and bodies["/vm"] == {"state": "Paused"}


def test_firecrackers_refusal_is_told_in_its_words(tmp_path: Path) -> None:
    fake = Firecracker("/boot-source")
    with pytest.raises(SandboxError, match=r"refused PUT /boot-source \(400\): the kernel file cannot be opened"):
        asyncio.run(boot_on(tmp_path, fake))
    assert len(fake.asked) == 2, "nothing is asked after a refusal"


@pytest.mark.parametrize("answer", [b"OK 1073741824\n", b"", b"no\n"])
def test_the_way_to_a_guests_port(tmp_path: Path, answer: bytes) -> None:
    async def monitor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"CONNECT 1024\n"
        writer.write(answer)
        if answer.startswith(b"OK"):
            writer.write(b"hello")
        writer.close()

    async def connect() -> bytes:
        server = await asyncio.start_unix_server(monitor, tmp_path / "vsock")
        try:
            reader, writer = await connect_vsock(tmp_path, "vsock", 1024)
            writer.close()
            return await reader.read(5)
        finally:
            server.close()

    if answer.startswith(b"OK"):
        assert asyncio.run(connect()) == b"hello"
    else:
        with pytest.raises(TransportError, match="does not listen on port 1024"):
            asyncio.run(connect())
