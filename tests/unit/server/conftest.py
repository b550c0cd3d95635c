"""One server over the scripted model for each file of this folder."""

from collections.abc import Iterator

import pytest
from mock_model import ScriptModel, byte_tokenizer
from scripted_api import reply
from starlette.testclient import TestClient

from rorqual.engine import Engine
from rorqual.server import create_app


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ScriptModel(reply), byte_tokenizer()) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, "minke"), raise_server_exceptions=False) as client:
        yield client
