"""schemathesis asks the server what its description allows, and what it forbids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.generation import GenerationMode

from tests.serve.conftest import Served
from tests.serve.fake_engine import FakeEngine
from tests.toy_server import run_app
from vipllava.serve.app import build_app
from vipllava.serve.settings import ServerSettings


@pytest.fixture(scope="module")
def toy() -> Iterator[Served]:
    engine = FakeEngine()
    app = build_app({"toy": engine}, ServerSettings())
    with run_app(app) as server:
        yield Served(server, engine, app.state.serving)


def test_what_the_description_has(toy: Served):
    found = toy.http.get("/openapi.json").json
    assert set(found["paths"]) == {
        "/v1/models", "/v1/models/{model_id}", "/v1/chat/completions", "/v1/regions/preview",
        "/metrics", "/health", "/ready",
    }  # fmt: skip
    body = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    names = found["components"]["schemas"]["ChatRequest"]
    assert {"regions", "overlay", "top_k", "model", "messages"} <= set(names["properties"])
    assert names["additionalProperties"] is False


def ask_all(toy: Served, mode: GenerationMode, num_examples: int) -> list[str]:
    """Ask every operation, and return which were asked."""
    schema = schemathesis.openapi.from_url(f"{toy.http.url}/openapi.json")
    excluded: list[Any] = [checks.positive_data_acceptance]  # a model's name, an image, are made up
    asked: list[str] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # any text is a model's name
        strategy = operation.as_strategy(generation_mode=mode)

        @settings(
            max_examples=num_examples, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
        )  # fmt: skip
        @given(case=strategy)
        def check(case: Any) -> None:
            case.call_and_validate(excluded_checks=excluded, timeout=20)

        check()
        asked.append(operation.label)
    return asked


@pytest.mark.parametrize(("mode", "num_operations"), [("positive", 7), ("negative", 2)])
def test_a_few_requests_of_each_kind(mode: str, num_operations: int, toy: Served):
    assert len(ask_all(toy, GenerationMode(mode), 3)) == num_operations


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_many_requests_of_each_kind(mode: GenerationMode, toy: Served):
    assert ask_all(toy, mode, 300)
