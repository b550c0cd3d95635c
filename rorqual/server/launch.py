"""Launch commands of vLLM and SGLang for V4, and keeping one of them running behind this server.

The flags are those of their public documentation and recipes for DeepSeek-V4 (vLLM's blog of 24 April 2026 and its
recipes, SGLang's cookbook): vLLM wants V4's tokenizer mode, 256-token blocks and an FP8 cache; both have parsers of
their own for clients that ask them directly. Neither was run by us.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from rorqual.errors import ConfigError, MissingExtraError
from rorqual.server.upstream_wire import Offer, connect

EngineName = Literal["vllm", "sglang"]
Parallel = Literal["tensor", "data"]

_STOP_S = 30.0
_LOOK_S = 1.0


@dataclass(frozen=True)
class Launch:
    """What to start. parallel: how attention is spread over the GPUs; experts are spread over all of them either way.

    context: most tokens of prompt and output; the engine's own choice otherwise. more: further flags, as they are.
    """

    engine: EngineName
    model: str
    name: str
    gpus: int
    port: int
    host: str = "127.0.0.1"
    parallel: Parallel = "tensor"
    context: int | None = None
    more: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"--gpus is {self.gpus}, but a model runs on at least one.")

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def command(self) -> list[str]:
        """The command line, ready for `subprocess`."""
        return [*(self._vllm() if self.engine == "vllm" else self._sglang()), *self.more]

    def shown(self) -> str:
        """The command for a shell, a flag a line."""
        out = ""
        for word in self.command():
            word = "python" if word == sys.executable else word  # the command may be meant for another machine
            starts = word.startswith("--")
            out += (" \\\n    " if starts else " " if out else "") + shlex.quote(word)
        return out

    def _vllm(self) -> list[str]:
        spread = "--tensor-parallel-size" if self.parallel == "tensor" else "--data-parallel-size"
        words = [
            "vllm", "serve", self.model,
            "--host", self.host, "--port", str(self.port),
            "--served-model-name", self.name,
            spread, str(self.gpus),
            "--tokenizer-mode", "deepseek_v4",
            "--kv-cache-dtype", "fp8",
            "--block-size", "256",
            "--enable-prompt-tokens-details",
            "--reasoning-parser", "deepseek_v4",
            "--tool-call-parser", "deepseek_v4",
            "--enable-auto-tool-choice",
        ]  # fmt: skip
        words += ["--enable-expert-parallel"] if self.gpus > 1 else []
        return words + (["--max-model-len", str(self.context)] if self.context is not None else [])

    def _sglang(self) -> list[str]:
        words = [
            sys.executable, "-m", "sglang.launch_server",
            "--model-path", self.model,
            "--host", self.host, "--port", str(self.port),
            "--served-model-name", self.name,
            "--tp-size", str(self.gpus),
            "--enable-cache-report",
            "--reasoning-parser", "deepseek-v4",
            "--tool-call-parser", "deepseekv4",
        ]  # fmt: skip
        if self.gpus > 1:
            words += ["--ep-size", str(self.gpus)]
            words += ["--dp-size", str(self.gpus), "--enable-dp-attention"] if self.parallel == "data" else []
        return words + (["--context-length", str(self.context)] if self.context is not None else [])


def check_installed(engine: EngineName) -> None:
    """Raises: MissingExtraError when the engine is not on this machine; it is no dependency of ours."""
    there = shutil.which("vllm") is not None if engine == "vllm" else importlib.util.find_spec("sglang") is not None
    if not there:
        raise MissingExtraError(
            f"{engine} is not installed here, so it cannot be launched. Install it by its own instructions (it brings "
            "its own build of torch for GPUs), print the command with --dry-run and run it elsewhere, or attach to a "
            "running server with --upstream URL."
        )


@contextmanager
def running(launch: Launch, *, patience_s: float = 3600.0) -> Iterator[Offer]:
    """Start the engine, wait until it serves, and stop it at the end.

    patience_s: how long it may load. Raises: ConfigError when it ends before it serves, or takes longer.
    """
    process = subprocess.Popen(launch.command())
    try:
        yield _wait(launch, process, patience_s)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait(launch: Launch, process: subprocess.Popen[bytes], patience_s: float) -> Offer:
    deadline = time.monotonic() + patience_s
    while True:
        if process.poll() is not None:
            raise ConfigError(
                f"{launch.engine} ended with status {process.returncode} before it served anything. Its own messages "
                f"are above. The command was:\n{launch.shown()}"
            )
        with suppress(ConfigError):  # nothing answers yet, or another server that has the port
            return connect(launch.url, model=launch.name)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{launch.engine} does not answer at {launch.url} after {patience_s:g} s. Look at its messages above; "
                "start it by hand (--dry-run prints the command) and attach with --upstream."
            )
        time.sleep(_LOOK_S)
