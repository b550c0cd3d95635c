"""Two processes in network namespaces of their own, joined by a virtual cable of a chosen bandwidth.

Linux as root, with `ip` and `tc` (iproute2), `unshare` and `nsenter` (util-linux). The namespaces have no names: they
and the cable in them end with the processes, however those end, so nothing is ever left behind. The processes end when
their standard input closes, which it does when the script dies.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ADDRESSES = ("10.213.7.1", "10.213.7.2")
DEVICE = "rorqual0"
BURST_BYTES = 1 << 17
"""What the link may send at once after a pause; a segment of 64 KiB must fit, or it is cut into packets."""
QUEUE_BYTES = 8 << 20
"""What may wait in front of the link; enough that nothing is dropped."""


def reason_against() -> str | None:
    """Why throttled links cannot be made here, with the cure; None when they can."""
    if sys.platform != "linux":
        return "Network namespaces exist on Linux only. Run this benchmark there."
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"This machine lacks {', '.join(missing)}. Install the packages iproute2 and util-linux."
    if os.geteuid() != 0:
        return "Network namespaces and tc need root. Run this benchmark with sudo, or in a container started as root."
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    if probe.returncode:
        return (
            f"This system refuses network namespaces ({probe.stderr.strip()}). Run in a container with CAP_SYS_ADMIN."
        )
    return None


class Pair:
    """Two copies of a Python script at the ends of a link; `ask` sends both a request and reads their answers.

    A script gets its rank, both addresses and the network device in its environment (RANK, MASTER_ADDR,
    GLOO_SOCKET_IFNAME) and answers each line of JSON on its standard input with one on its standard output.
    """

    def __init__(self, script: Path) -> None:
        reason = reason_against()
        if reason is not None:
            raise SystemExit(reason)
        self._script = script
        self._ends: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Pair":
        try:
            for rank in range(2):
                self._ends.append(self._start(rank))
            for end in self._ends:  # the first line says that the process runs, in its own namespace
                self._answer(end)
            self._join()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self, rank: int) -> "subprocess.Popen[str]":
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        }  # fmt: skip
        # a process group of its own: Ctrl-C reaches the parent, which closes the pipes
        return subprocess.Popen(
            ["unshare", "--net", sys.executable, str(self._script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, process_group=0,
        )  # fmt: skip

    def _join(self) -> None:
        a, b = (str(end.pid) for end in self._ends)
        self._inside(0, "ip", "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", b)
        for rank in range(2):
            self._inside(rank, "ip", "address", "add", f"{ADDRESSES[rank]}/24", "dev", DEVICE)
            self._inside(rank, "ip", "link", "set", "lo", "up")
            self._inside(rank, "ip", "link", "set", DEVICE, "up")
            # a plain window that stays open over the pauses between messages, as on a cluster's own network
            for name, value in (("tcp_congestion_control", "reno"), ("tcp_slow_start_after_idle", "0")):
                self._inside(rank, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}")

    def _inside(self, rank: int, *command: str) -> None:
        done = subprocess.run(
            ["nsenter", "--net", "--target", str(self._ends[rank].pid), *command], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"`{' '.join(command)}` failed in a network namespace: {done.stderr.strip()}")

    def throttle(self, bytes_per_s: float) -> None:
        """Set the bandwidth of both directions."""
        for rank in range(2):
            self._inside(
                rank, "tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", "rate", f"{int(8 * bytes_per_s)}bit",
                "burst", str(max(BURST_BYTES, int(bytes_per_s / 1000))), "limit", str(QUEUE_BYTES),
            )  # fmt: skip

    def ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Both ranks' answers."""
        for end in self._ends:
            assert end.stdin is not None
            end.stdin.write(json.dumps(request) + "\n")
            end.stdin.flush()
        return [self._answer(end) for end in self._ends]

    @staticmethod
    def _answer(end: "subprocess.Popen[str]") -> dict[str, Any]:
        assert end.stdout is not None
        line = end.stdout.readline()
        if not line:
            raise SystemExit(f"A process of the pair ended early (exit status {end.wait()}); its message stands above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End both processes, and with them the namespaces and the link."""
        for end in self._ends:
            if end.stdin is not None:
                end.stdin.close()
        for end in self._ends:
            try:
                end.wait(timeout=5)
            except subprocess.TimeoutExpired:
                end.kill()
                end.wait()
        self._ends = []
