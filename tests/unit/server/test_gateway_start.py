"""The gateway needs no model, so it starts where torch is not installed, and sooner."""

import subprocess
import sys

_SCRIPT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("no torch here", name="torch")

sys.meta_path.insert(0, Without())
import rorqual.cli.referee
from starlette.testclient import TestClient
from rorqual.referee import Options, Policy
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_run import run_gateway
from rorqual.server.gateway_wire import Upstream

with TestClient(create_gateway(Gateway(Upstream("http://127.0.0.1:1"), Options("enforce", Policy())))) as client:
    print(client.get("/health").json()["status"])
"""


def test_the_gateway_starts_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr
