"""Whatever the API's own schema permits, and much that it does not, is answered without an error of the server."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402


@pytest.fixture(scope="module")
def schema(serving):
    with serving("--max_new_tokens=4", "--max_queue=1000") as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_breaks_the_server(schema, mode):
    tried, answered = set(), set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and operation.method in ("get", "head"):
            continue  # nothing can be wrong with it

        @settings(
            max_examples=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            answered.add(case.call_and_validate(checks=[not_a_server_error]).status_code)

        ask()
        tried.add(operation.path)
    assert {"/v1/chat/completions", "/v1/completions", "/feedback"} <= tried
    assert answered & ({200, 204} if mode is GenerationMode.POSITIVE else {400})
