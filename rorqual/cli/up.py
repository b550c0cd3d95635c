"""`rorqual up`: the main job. The bundled model, its server and the web page, offline, in one command."""

from rorqual.cli.options import Json, ModelOption, Port, Threads
from rorqual.cli.serving import start
from rorqual.errors import ConfigError

HOST = "127.0.0.1"


def up(model: ModelOption = "minke", port: Port = 8000, threads: Threads = None, as_json: Json = False) -> None:
    """Start the bundled model with its web page and API on this machine; works offline.

    \b
    rorqual up
    rorqual up --port 8001 --threads 2
    """
    try:
        start(model, host=HOST, port=port, threads=threads, as_json=as_json)
    except ConfigError as error:
        if f"{HOST}:{port}" in str(error):
            raise ConfigError(f"{error} With make: make up PORT={port + 1}") from error
        raise
