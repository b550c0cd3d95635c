"""The server against its own OpenAPI document, with schemathesis: whatever is sent, no failure of the server and no
status that the document does not name.
"""

import os
from collections import Counter
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from mock_model import ScriptModel, byte_tokenizer

from rorqual.engine import Engine
from rorqual.referee import Options, Policy
from rorqual.server import create_app
from rorqual.server.gateway import Gateway, create_gateway
from rorqual.server.gateway_wire import Upstream

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (clients extra)")

NUM_CASES = int(os.environ.get("RORQUAL_SCHEMA_CASES", "5000"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_failure_and_no_unknown_status() -> None:
    with Engine(ScriptModel(lambda prompt: "Hi", context=512), byte_tokenizer(), max_queued=10_000) as engine:
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(engine, "minke"))
        operations = [result.ok() for result in schema.get_all_operations()]
        posts = [one for one in operations if one.method == "post"]
        statuses: Counter[int] = Counter()
        for one in operations:
            for mode in schemathesis.GenerationMode:
                statuses += run(one, mode, NUM_CASES // (2 * len(posts)) + 1 if one in posts else 10)
        assert statuses.total() >= NUM_CASES
        assert statuses[200] > NUM_CASES // 50 and statuses[400] > NUM_CASES // 50, statuses
        assert engine.is_alive and engine.occupancy() == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gateways_routes_hold_to_their_document() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"id": "u", "object": "chat.completion", "choices": [choice]})

    upstream = Upstream("http://mock", transport=httpx2.MockTransport(answer))
    gateway = Gateway(upstream, Options("enforce", Policy()))
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_gateway(gateway))
    statuses: Counter[int] = Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {one.path for one in operations} >= {"/v1/messages", "/v1/responses", "/v1/evals", "/v1/referee/check"}
    for one in operations:
        for mode in schemathesis.GenerationMode:
            statuses += run(one, mode, 8)
    assert statuses[200] > 25 and statuses[400] > 25, statuses


def run(operation: Any, mode: Any, count: int) -> Counter[int]:
    """Send `count` cases of one operation; which statuses came how often."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

    statuses: Counter[int] = Counter()
    steered = st.integers(0, 9)

    @given(case=operation.as_strategy(generation_mode=mode), steer=steered)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def one(case: Any, steer: int) -> None:
        if isinstance(case.body, dict) and steer:  # a name and a length that exist, or nothing gets past them
            case.body["model"] = "minke"
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = case.body[name] % 100 + 1
        response = case.call()
        case.validate_response(response, checks=[not_a_server_error, status_code_conformance, content_type_conformance])
        statuses[response.status_code] += 1

    while statuses.total() < count:
        before = statuses.total()
        try:
            one()
        except Unsatisfiable:  # nothing can be wrong with an operation without parameters
            break
        if statuses.total() == before:
            break
    return statuses
