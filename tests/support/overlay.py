"""Runs a shell script on an overlay of folders, in namespaces that end with it, so nothing stays mounted."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path


def on_overlay(lowers: Sequence[Path], upper: Path, script: str) -> str:
    """Output of `script`, run in the root of an overlay of `lowers` (topmost first) that writes to `upper`."""
    work, merged = upper.with_name(upper.name + ".work"), upper.with_name(upper.name + ".merged")
    for folder in (upper, work, merged):
        folder.mkdir(exist_ok=True)
    options = f"userxattr,lowerdir={':'.join(map(str, lowers))},upperdir={upper},workdir={work}"
    whole = (
        f"set -e; mount -t overlay overlay -o {shlex.quote(options)} {shlex.quote(str(merged))}; cd {merged}; {script}"
    )
    done = subprocess.run([*_unshare(), "sh", "-c", whole], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _unshare() -> list[str]:
    return ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


@lru_cache
def missing() -> str | None:
    """Why no overlay can be mounted here, or None."""
    script = (
        "d=$(mktemp -d) && mount -t tmpfs t $d && mkdir $d/l $d/u $d/w $d/m && "
        "mount -t overlay o -o userxattr,lowerdir=$d/l,upperdir=$d/u,workdir=$d/w $d/m && umount $d/m $d && rmdir $d"
    )
    try:
        done = subprocess.run([*_unshare(), "sh", "-c", script], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else f"no overlay can be mounted: {done.stderr.strip()}"
