"""`rorqual up`: the main job. The bundled model, its server and the web page, offline, in one command."""

from rorqual.cli.operating import build_operations
from rorqual.cli.options import CacheFormat, Json, Memory, ModelOption, Port, Speculate, Threads, Weights
from rorqual.cli.serving import require_server, start
from rorqual.errors import ConfigError

HOST = "127.0.0.1"


def up(
    model: ModelOption = "minke",
    port: Port = 8000,
    speculate: Speculate = False,
    threads: Threads = None,
    weights: Weights = None,
    memory: Memory = None,
    cache_format: CacheFormat = None,
    as_json: Json = False,
) -> None:
    """Start the bundled model with its web page and API on this machine; works offline.

    \b
    rorqual up
    rorqual up --port 8001 --threads 2
    rorqual up --weights fp4 --cache-format fp8
    """
    require_server()
    from rorqual.engine import CacheSettings, EngineSettings

    settings = EngineSettings(cache=CacheSettings(), speculate=speculate)
    try:
        start(
            model, host=HOST, port=port, settings=settings, threads=threads, weights=weights, memory=memory,
            cache_format=cache_format, operations=build_operations(no_auth=True), as_json=as_json,
        )  # fmt: skip
    except ConfigError as error:
        if f"{HOST}:{port}" in str(error):
            raise ConfigError(f"{error} With make: make up PORT={port + 1}") from error
        raise
