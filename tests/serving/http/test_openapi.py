"""Requests made up from the OpenAPI document, right ones and wrong ones."""

import pytest
from hypothesis import HealthCheck, given, settings

from recbole_ssm.serving.http.app import create_app

from .conftest import ask

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_fails_the_server(served, mode):
    document = schemathesis.openapi.from_asgi("/openapi.json", create_app(served))
    for operation in (one.ok() for one in document.get_all_operations()):
        if mode == schemathesis.GenerationMode.NEGATIVE and operation.path in ("/health", "/metrics"):
            continue  # which take nothing that could be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def holds(case):
            case.call_and_validate(checks=CHECKS)

        holds()


def test_every_route_tells_its_errors(served):
    (answer,) = ask(served, [("GET", "/openapi.json", None)])
    paths = answer.json()["paths"]
    assert set(paths) == {
        "/recommend", "/sessions/{session}", "/sessions/{session}/events", "/sessions/{session}/recommendations",
        "/similar", "/items", "/health", "/metrics",
    }  # fmt: skip
    for operations in paths.values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert response["content"]["application/json"]["schema"]["$ref"].endswith("/Failure")
