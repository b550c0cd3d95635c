"""Which drivers work on this machine: found out by running a command in a sandbox of each, never by looking at files.

The outcome is kept in the cache folder per boot, user, driver and the programs it depends on, so it costs once a boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rorqual import log
from rorqual.errors import RorqualError
from rorqual.folders import cache_folder
from rorqual.sandbox.agent.build import FOLDER, agent_binary
from rorqual.sandbox.drivers import drivers
from rorqual.sandbox.drivers.base import Driver
from rorqual.sandbox.errors import Unsupported
from rorqual.sandbox.home import Home, Record
from rorqual.sandbox.link import Link
from rorqual.sandbox.spec import ISOLATION_ORDER, Isolation, Kind, SandboxSpec
from rorqual.sandbox.wire import Start, Tag, Type

_logger = log.get(__name__)

PROGRAMS = ("bwrap", "runc", "runsc", "firecracker", "qemu-system-x86_64", "qemu-system-aarch64")
RETRY_FAILED_S = 300.0
_worked: dict[tuple[str, str], Probe] = {}  # in this process


@dataclass(frozen=True)
class Probe:
    """Whether a driver ran `true`, or why not; seconds: how long that took."""

    kind: str
    driver: str
    works: bool
    why: str
    seconds: float
    when: float


def _key(driver: Driver) -> str:
    parts = [driver.kind, driver.name, str(os.geteuid()), Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
    for name in PROGRAMS:
        path = shutil.which(name)
        if path is not None:
            status = os.stat(path)
            parts += [path, str(status.st_size), str(status.st_mtime_ns)]
    for source in sorted([*FOLDER.glob("*.[ch]"), *Path(__file__).parent.glob("drivers/*.py")]):
        parts.append(hashlib.sha256(source.read_bytes()).hexdigest())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


async def probe(driver: Driver, *, fresh: bool = False) -> Probe:
    """Run a command through this driver, or look up how that went since boot."""
    missing = driver.missing()
    if missing is not None:
        return Probe(driver.kind, driver.name, False, missing, 0.0, time.time())
    if not fresh and (driver.kind, driver.name) in _worked:
        return _worked[driver.kind, driver.name]
    path = cache_folder() / "probes" / f"{_key(driver)}.json"
    if not fresh:
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = Probe(**json.loads(path.read_text()))
            if found.works:
                _worked[driver.kind, driver.name] = found
            if found.works or time.time() - found.when < RETRY_FAILED_S:
                return found
    start = time.monotonic()
    try:
        await asyncio.to_thread(agent_binary)  # built at first use, which may take longer than a start
        await asyncio.wait_for(_try(driver), driver.probe_timeout_s)
        why = ""
    except TimeoutError:
        why = f"it started but ran no command within {driver.probe_timeout_s:g} s"
    except (RorqualError, OSError) as error:
        why = str(error)
    if why:
        _logger.info("%s of %s: %s", driver.name, driver.kind, why)
        why = driver.explain(why)
    result = Probe(driver.kind, driver.name, not why, why, time.monotonic() - start, time.time())
    if result.works:
        _worked[driver.kind, driver.name] = result
    else:
        _worked.pop((driver.kind, driver.name), None)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(result)))
        os.replace(scratch, path)
    return result


async def _try(driver: Driver) -> None:
    """Start it with the agent in a folder of its own, run `true` in it, and take all away again."""
    with tempfile.TemporaryDirectory(prefix="rorqual-probe-") as base:
        home = Home.make(driver.kind, base)
        spec = SandboxSpec(driver.kind)
        record = Record(home.id, driver.name, spec, time.time())
        home.write(record)
        home.set_deadlines({"lifetime": driver.probe_timeout_s + 10})
        try:
            record.running = await driver.start(spec, home.path)
            link = Link(driver, home, record)
            try:
                await link.open(within_s=driver.probe_timeout_s, first=True)
                fields = await link.request(
                    Type.START,
                    [(Tag.HANDLE, "probe"), (Tag.ARG, "true"), (Tag.TIMEOUT_MS, 60_000), (Tag.FLAGS, int(Start.WAIT))],
                )
            finally:
                await link.close(for_good=True)
            if fields.number(Tag.STATUS):
                raise Unsupported(f"`true` ended with status {fields.number(Tag.STATUS)} in it", "run")
        finally:
            if record.running is not None:
                await driver.stop(record.running, home.path)
            home.remove("closed")


async def probe_all(kind: Kind, *, fresh: bool = False) -> list[Probe]:
    """Every driver of a kind, by preference."""
    return [await probe(driver, fresh=fresh) for driver in drivers(kind)]


async def choose(kind: Kind, name: str | None, min_isolation: Isolation | None) -> Driver:
    """The first driver that works and isolates enough. Raises: Unsupported with what was tried and why it failed."""
    reasons = []
    for driver in drivers(kind):
        if name is not None and driver.name != name:
            continue
        isolation = driver.capabilities().isolation
        if min_isolation is not None and ISOLATION_ORDER.index(isolation) < ISOLATION_ORDER.index(min_isolation):
            reasons.append(f"{driver.name}: isolates by {isolation}, asked for at least {min_isolation}")
            continue
        found = await probe(driver)
        if found.works:
            return driver
        reasons.append(f"{driver.name}: {found.why}")
    tried = "".join(f"\n  {reason}" for reason in reasons) or f"\n  no driver of that name ({name})"
    raise Unsupported(
        f"no {kind} sandbox can be made here:{tried}\n  `rorqual sandbox doctor` says what would allow more.", "kind"
    )
