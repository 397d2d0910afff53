"""No request breaks the server, whether the API's own schema permits it or not."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402


@pytest.fixture(scope="module")
def schema(serving):
    with serving("--max_new_tokens=4", "--max_queue=1000", "--max_seconds=1") as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("max_examples", [15, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_breaks_the_server(schema, mode, max_examples):
    examples = settings(
        max_examples=max_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    paths = set()
    statuses = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and operation.method in ("get", "head"):
            continue  # no parameter of these can be wrong

        @examples
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case):
            response = case.call()
            statuses.add(response.status_code)
            # more replies than a second is enough for: the server may say so
            if response.status_code != 503 or "timed out" not in response.text:
                case.validate_response(response, checks=[not_a_server_error])

        ask()
        paths.add(operation.path)
    assert {"/v1/chat/completions", "/v1/completions", "/feedback"} <= paths
    assert statuses & ({200, 204} if mode is GenerationMode.POSITIVE else {400})
