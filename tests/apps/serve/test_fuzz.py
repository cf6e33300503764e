"""The API under requests made from its own description, valid and not."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mmssl.apps.search import Index
from mmssl.apps.serve import ServerLimits, create_app
from mmssl.inference import Model
from tests.helpers.uploads import bomb, image

UPLOADS = [image(), image(kind="JPEG"), image()[:-40], bomb(9000, 9000), b"", b"hello"]

EXAMPLES = 6
"""Requests a route and mode."""
WITHOUT_INPUT = ("/api/health", "/api/model")
"""Routes of which no request can be wrong."""


@pytest.fixture(scope="module")
def schema(model: Model, index: Index) -> schemathesis.BaseSchema:
    """The description of the application, which then knows the fuzzer's host name."""
    schemathesis.openapi.media_type("application/octet-stream", st.sampled_from(UPLOADS))
    app = create_app(model, index, ServerLimits(hosts=("testserver",)))
    return schemathesis.openapi.from_asgi("/api/openapi.json", app)


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_the_api_keeps_what_it_describes(schema: schemathesis.BaseSchema, mode: schemathesis.GenerationMode) -> None:
    """By requests that fit the description and by such that do not: none brings a status, a type or a form of answer
    that is not in the description, or an error of the server; wrong requests are refused."""
    tried = set()

    def check(case: schemathesis.Case) -> None:
        # A request may fit the description and its image still be none.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])
        tried.add((case.method, case.path))

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.path in WITHOUT_INPUT:
            continue
        strategy = operation.as_strategy(generation_mode=mode)
        run = given(case=strategy)(check)
        settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        )(run)()
    assert len(tried) >= 6
