"""Digests of earlier self-tests on this machine: the same weights and operations must give the same bits every time.

Between machines nothing is promised: another processor may get another build of the operations, with other bits. The
digest is printed so that it can be compared.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from rorqual.engine.selftest.report import Check, SubjectReport
from rorqual.engine.store.fingerprint import store_fingerprint
from rorqual.model import Transformer
from rorqual.ops.native import cache_folder


def default_path() -> Path:
    """Beside the built operations."""
    return cache_folder() / "selftest.json"


def identity(model: Transformer) -> str:
    """Names a model's weights and how they are kept: a model trained further under its old name is another one."""
    return store_fingerprint(model).hex()


def compare(report: SubjectReport, key: str, path: Path) -> None:
    """Add a check against the digest that `path` remembers for `key` and these operations; remember it otherwise."""
    check = Check("earlier runs", "the digest of the plain run against that of an earlier process")
    name = f"{key} {report.arithmetic.kernels} {report.arithmetic.dtype}"
    known: dict[str, dict[str, str]] = {}
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    old = known.get(name)
    if old is None:
        check.note = f"none yet; kept in {path}"
        known[name] = {"digest": report.digest, "since": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(path)
        except OSError as error:
            check.note = f"none yet, and it could not be kept ({error})"
    else:
        check.note = f"the same since {old['since']}"
        check.holds(old["digest"] == report.digest, f"the digest was {old['digest']} on {old['since']}")
    report.checks.append(check)
