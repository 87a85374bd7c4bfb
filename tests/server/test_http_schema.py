"""The OpenAPI description: complete, and true under whatever schemathesis makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from droidspeak.config import load_settings
from droidspeak.integrations.server.http.app import make_app
from droidspeak.integrations.server.state import DaemonState
from droidspeak.storage.testing import make_chunk

from .httpclient import Serving, memory, serving, store_of

DESCRIPTION = make_app(DaemonState(load_settings(overrides={"tiers": ["cpu://"]}), {})).openapi()
OPERATIONS = [(path, method) for path, operations in DESCRIPTION["paths"].items() for method in operations]
TOKEN = "schema-0123456789abcdef"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
KEY = "/v1/chunks/{source}/{shard}/{prefix}"
HELD = make_chunk(0)
MODES = list(schemathesis.GenerationMode)
BOUNDED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    tokens = [{"name": "all", "token": TOKEN, "scopes": ["read", "write", "admin"]}]
    with serving(store_of(memory()), tokens=tokens) as served:
        for seed in range(3):
            served.store.write(make_chunk(seed))
        yield served


def strategy_of(path: str, method: str, modes: Sequence[schemathesis.GenerationMode]) -> Any:
    """Requests to one operation: allowed ones, and others."""
    schema: Any = schemathesis.openapi.from_dict(DESCRIPTION)
    operation = schema[path][method.upper()]
    return st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])


def validate(served: Serving, case: Any) -> None:
    case.call_and_validate(
        base_url=f"http://127.0.0.1:{served.server.port}",
        headers={"Authorization": f"Bearer {TOKEN}"},
        checks=CHECKS,
    )


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda part: part.replace(KEY, "KEY"))
def test_answers_are_as_described(served, path, method):
    @BOUNDED
    @given(case=strategy_of(path, method, MODES))
    def ask(case: Any) -> None:
        validate(served, case)

    ask()
    assert served.client.ask("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    ("path", "method"),
    [place for place in OPERATIONS if place[0].startswith(KEY)],
    ids=lambda part: part.replace(KEY, "KEY"),
)
def test_answers_about_a_chunk_that_is_held_are_as_described(served, path, method):
    names = dict(zip(("source", "shard", "prefix"), str(HELD.key).split("/"), strict=True))

    @BOUNDED
    @given(case=strategy_of(path, method, [schemathesis.GenerationMode.POSITIVE]))
    def ask(case: Any) -> None:
        served.store.write(HELD)
        case.path_parameters = dict(names)
        validate(served, case)

    ask()


def test_everything_is_described():
    assert DESCRIPTION["openapi"].startswith("3.1")
    scheme = DESCRIPTION["components"]["securitySchemes"]["HTTPBearer"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, method in OPERATIONS:
        operation = DESCRIPTION["paths"][path][method]
        assert operation["description"], path
        open_to_all = path in ("/healthz", "/readyz")
        assert ("security" in operation) != open_to_all, path
        for parameter in operation.get("parameters", []):
            assert parameter["schema"], path
            assert parameter.get("description"), (path, parameter["name"])
        if not open_to_all:
            assert {"401", "403", "422", "503"} <= set(operation["responses"]), path
        for status, answer in operation["responses"].items():
            assert answer["description"], (path, status)
            if status >= "4":
                shape = answer["content"]["application/json"]["schema"]
                assert shape == {"$ref": "#/components/schemas/ErrorAnswer"}, (path, status)


def test_no_page_that_loads_scripts(served):
    for path in ("/docs", "/redoc"):
        assert served.as_caller(TOKEN).ask("GET", path).refusal == (404, "not_found")
    told = served.as_caller(TOKEN).ask("GET", "/openapi.json")
    assert told.json == DESCRIPTION
