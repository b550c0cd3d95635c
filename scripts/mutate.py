"""Shows that tests guard what they say: changes one line of the program at a time and runs the tests that must fail.

    python scripts/mutate.py                       all of tests/mutations/*.toml
    python scripts/mutate.py --only S1 S7          those of these ids of the specification, or of these names
    python scripts/mutate.py --list                what there is, without running anything
    python scripts/mutate.py --json --fresh        JSON lines; nothing is taken from earlier results

An entry names a file, a text that stands in it exactly once, another in its place, and the tests that must notice. The
tree is copied to a temporary folder; the checkout is never touched. There each test must first pass as it is, then fail
with the change: in its own body (or at its end, where a test looks for what was left), not because it could not begin.

    killed     every test named failed with the change
    survived   one passed: the line it should guard is not guarded
    broken     one did not pass, or did not run, before the change; or it did not come to its body with it
    stale      the old text does not stand in the file exactly once

Results are kept in `build/mutations.jsonl` and hold as long as neither the entry, nor the changed file, nor the test's
file changes; so a run that was stopped goes on where it was. Exit code 0: all killed; 1: not; 2: wrong request.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LISTS, RESULTS = ROOT / "tests" / "mutations", ROOT / "build" / "mutations.jsonl"
STARTS_WITHIN_S = 600.0
"""On a busy machine even an interpreter takes its time; a test that hangs is ended by its own timeout."""
NOT_COPIED = (".git", ".venv", "build", "dist", "runs", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")


@dataclass(frozen=True)
class Mutation:
    """One change. spec: ids of the specification's test list; tests: node ids, all of which must fail with it."""

    name: str
    spec: tuple[str, ...]
    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    timeout_s: float = 60.0
    """Of one test. A change that makes a test wait for ever has failed it after this time."""

    def count(self, root: Path) -> int:
        """How often the old text stands in the file; 0 where there is no such file."""
        path = root / self.file
        return path.read_text().count(self.old) if path.is_file() else 0


def load(folder: Path = LISTS) -> list[Mutation]:
    """Every entry of a folder's lists. Raises: SystemExit naming the list and the entry that cannot be read."""
    found: list[Mutation] = []
    for path in sorted(folder.glob("*.toml")):
        with path.open("rb") as file:
            data = tomllib.load(file)
        for number, entry in enumerate(data.get("mutation", []), 1):
            module = entry.pop("module", "")
            try:
                tests = tuple(test if "::" in test else f"{module}::{test}" for test in entry.pop("tests"))
                found.append(Mutation(spec=tuple(entry.pop("spec")), tests=tests, **entry))
            except (KeyError, TypeError) as error:
                raise SystemExit(f"{path}, entry {number}: {error}. See `Mutation` for what an entry has.") from None
    return found


@dataclass
class Result:
    """What came of one mutation. details: for each test what it said, or why it counts for nothing."""

    name: str
    spec: list[str]
    verdict: str
    seconds: float
    details: dict[str, str] = field(default_factory=dict)
    key: str = ""


def key_of(mutation: Mutation, root: Path) -> str:
    """Changes when the entry, the file it changes or a test's file changes."""
    digest = hashlib.sha256(repr(mutation).encode())
    for name in sorted({mutation.file, *(test.partition("::")[0] for test in mutation.tests)}):
        path = root / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()[:24]


class Copy:
    """A copy of the tree with a cache of its own, in which tests run, each run in a folder that is removed after it."""

    def __init__(self, source: Path, scratch: Path) -> None:
        self.tree, self.cache, self._scratch, self._runs = scratch / "tree", scratch / "cache", scratch, 0
        scratch.chmod(0o755)  # some tests run as another user
        shutil.copytree(source, self.tree, ignore=shutil.ignore_patterns(*NOT_COPIED, "__pycache__"), symlinks=True)
        self.cache.joinpath("rorqual").mkdir(parents=True)
        built = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rorqual"
        for name in ("kernels", "initramfs"):  # of virtual machines: long to build, and not what is changed here
            if (built / name).is_dir():
                shutil.copytree(built / name, self.cache / "rorqual" / name, symlinks=True)

    @contextlib.contextmanager
    def changed(self, mutation: Mutation) -> Iterator[None]:
        """The tree with the change; afterwards as it was."""
        path = self.tree / mutation.file
        before = path.read_text()
        try:
            self._write(path, before.replace(mutation.old, mutation.new))
            yield
        finally:
            self._write(path, before)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()  # it is told from the source by time and size, which may both be the same

    def run(self, tests: list[str], timeout_s: float) -> dict[str, tuple[str, str]]:
        """What became of tests: passed, failed, skipped, error (not come to its body) or none; and what was said."""
        self._runs += 1
        folder = self._scratch / f"r{self._runs}"
        folder.mkdir(mode=0o755)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)
        options = ["-q", "--basetemp", str(folder / "base")]
        options += [word for name in ("pytest_timeout", "outcomes", "no:cacheprovider") for word in ("-p", name)]
        command = [sys.executable, "-m", "pytest", *options, "-o", f"timeout={timeout_s:g}", *tests]
        path = os.pathsep.join(map(str, (self.tree, self.tree / "tests" / "support")))
        environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(self.cache), "OMP_NUM_THREADS": "1"}
        environment |= {"TMPDIR": str(folder / "tmp"), "RORQUAL_OUTCOMES": str(folder / "outcomes")}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # most tests take less time than those plugins
        with (folder / "said").open("wb") as said:
            child = subprocess.Popen(
                command, cwd=self.tree, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        try:
            child.wait(timeout=STARTS_WITHIN_S + timeout_s * len(tests))
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        outcomes = _outcomes(folder / "outcomes")
        last = (folder / "said").read_text(errors="replace").strip().splitlines()[-1:]
        clear(folder)
        return {test: outcomes.get(test, ("none", "".join(last)[:200])) for test in tests}


def _outcomes(path: Path) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        phase = json.loads(line)
        test, outcome = phase["test"], phase["outcome"]
        if outcome == "failed" and phase["phase"] == "setup":
            outcome = "error"
        if test not in found or found[test][0] == "passed":
            found[test] = (outcome, phase["said"])
    return found


def clear(folder: Path) -> None:
    """End what a run left, with the program as it is here, and remove its files."""
    sys.path.insert(0, str(ROOT))
    from rorqual.errors import SandboxError
    from rorqual.sandbox import processes
    from rorqual.sandbox.home import all_homes
    from rorqual.sandbox.images.store import Store
    from rorqual.sandbox.sweep import end_home

    for base in sorted(path.parent for path in folder.rglob("sandboxes") if path.is_dir()):
        with mock.patch.dict(os.environ, RORQUAL_HOME=str(base)):
            for home in all_homes(base):
                with contextlib.suppress(SandboxError, OSError):
                    asyncio.run(end_home(home, "closed"))
            with contextlib.suppress(SandboxError, OSError):
                Store().local.drop()
    mark = f"{folder}/".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "cmdline").read_bytes() or mark in (path / "environ").read_bytes():
                found = processes.identify(int(path.name))
                if found is not None:
                    processes.end_all([found])
    shutil.rmtree(folder, ignore_errors=True)


def judge(mutation: Mutation, copy: Copy, before: dict[str, tuple[str, str]]) -> Result:
    """Run one mutation whose tests' outcomes without it are known."""
    start = time.monotonic()
    result = Result(mutation.name, list(mutation.spec), "killed", 0.0, key=key_of(mutation, copy.tree))
    count = mutation.count(copy.tree)
    if count != 1:
        result.verdict, result.details = "stale", {mutation.file: f"the old text stands in it {count} times"}
        return result
    unfit = [test for test in mutation.tests if before[test][0] != "passed"]
    if unfit:
        result.verdict = "broken"
        result.details = {test: f"before the change: {' '.join(before[test])}" for test in unfit}
        return result
    with copy.changed(mutation):
        after = copy.run(list(mutation.tests), mutation.timeout_s)
    for test, (outcome, said) in after.items():
        result.details[test] = said if outcome == "failed" else f"{outcome}: {said}" if said else outcome
    outcomes = {outcome for outcome, _ in after.values()}
    if outcomes != {"failed"}:
        result.verdict = "survived" if "passed" in outcomes else "broken"
    result.seconds = round(time.monotonic() - start, 1)
    return result


def unchanged(mutations: list[Mutation], copy: Copy, progress: Progress) -> dict[str, tuple[str, str]]:
    """What becomes of all their tests without a change; tests of one file run together."""
    by_file: dict[str, dict[str, float]] = {}
    for mutation in mutations:
        for test in mutation.tests:
            times = by_file.setdefault(test.partition("::")[0], {})
            times[test] = max(120.0, times.get(test, 0.0), mutation.timeout_s)
    found: dict[str, tuple[str, str]] = {}
    task = progress.add_task("as it is", total=sum(map(len, by_file.values())))
    for file, tests in by_file.items():
        progress.update(task, description=f"as it is: {file}")
        found |= copy.run(list(tests), max(tests.values()))
        if progress.disable:
            print(f"as it is: {file}", file=sys.stderr, flush=True)
        progress.advance(task, len(tests))
    return found


def earlier(path: Path) -> dict[str, Result]:
    """Results that were kept, by key."""
    found: dict[str, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            result = Result(**json.loads(line))
            if result.verdict == "killed":  # the rest may have been a bad moment
                found[result.key] = result
    return found


def chosen(mutations: list[Mutation], only: list[str]) -> list[Mutation]:
    """Those named by an id of the specification or by their own name. Raises: SystemExit for a name of none."""
    for word in only:
        if not any(word in (mutation.name, *mutation.spec) for mutation in mutations):
            raise SystemExit(f"nothing is called {word!r}; `python scripts/mutate.py --list` shows what there is.")
    return [one for one in mutations if not only or {one.name, *one.spec} & set(only)]


def show(results: list[Result], console: Console) -> None:
    """A table for people, and what survived in full."""
    table = Table("mutation", "guards", "verdict", "s", "how the first test failed")
    colours = {"killed": "green", "survived": "red"}
    for one in results:
        said = next(iter(one.details.values()), "")
        verdict = f"[{colours.get(one.verdict, 'yellow')}]{one.verdict}[/]"
        table.add_row(one.name, " ".join(one.spec), verdict, f"{one.seconds:.0f}", said[:60].replace("[", r"\["))
    console.print(table)
    for one in results:
        if one.verdict != "killed":
            lines = [f"{one.verdict}: {one.name}", *(f"  {test}: {said}" for test, said in one.details.items())]
            console.print("\n".join(lines), markup=False)
    counts = Counter(one.verdict for one in results)
    console.print(", ".join(f"{counts[name]} {name}" for name in ("killed", "survived", "broken", "stale")))


def arguments() -> Any:
    """From the command line."""
    first, *rest = (__doc__ or "").split("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ID", help="ids of the specification, or names")
    parser.add_argument("--list", action="store_true", help="show the entries and run nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--fresh", action="store_true", help="run again what has a result")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept (build/mutations.jsonl)")
    parser.add_argument("--lists", type=Path, default=LISTS, help="folder of the lists (tests/mutations)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to copy (this one)")
    parser.add_argument("--work", type=Path, help="where the copy is made (the temporary folder)")
    return parser.parse_args()


def main() -> int:
    """Run what is asked for; the exit code."""
    options = arguments()
    console = Console(stderr=options.json)
    try:
        mutations = chosen(load(options.lists), options.only)
    except SystemExit as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for one in mutations:
            print(f"{' '.join(one.spec):8} {one.name}: {one.why} ({one.file}; {len(one.tests)} tests)")
        return 0
    known = {} if options.fresh else earlier(options.results)
    keys = {mutation.name: key_of(mutation, options.root) for mutation in mutations}
    results = [known[keys[one.name]] for one in mutations if keys[one.name] in known]
    todo = [one for one in mutations if keys[one.name] not in known]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="mutate-", dir=options.work, ignore_cleanup_errors=True) as scratch,
        Progress(console=console, transient=True, disable=not (todo and console.is_terminal)) as progress,
    ):
        if todo:
            copy = Copy(options.root, Path(scratch))
            before = unchanged(todo, copy, progress)
            task = progress.add_task("changed", total=len(todo))
            for one in todo:
                progress.update(task, description=one.name)
                results.append(judge(one, copy, before))
                with options.results.open("a") as file:
                    file.write(json.dumps(vars(results[-1])) + "\n")
                if not console.is_terminal:
                    said = f"{results[-1].verdict}: {one.name} ({results[-1].seconds:.0f} s)"
                    print(said, file=sys.stderr, flush=True)
                progress.advance(task)
    if options.json:
        print(*(json.dumps(vars(one)) for one in results), sep="\n")
    else:
        show(results, console)
    return 0 if all(one.verdict == "killed" for one in results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the copy is removed
    sys.exit(main())
