"""An answer that fails in the engine: every client is told so in the API's form, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.unit.serving.process import user, wide_model
from tinylmm.generation.session import ChatModel
from tinylmm.models.checkpoint import load_model
from tinylmm.serving.app import make_app
from tinylmm.serving.options import ServeOptions
from tinylmm.serving.service import Service

CHAT = ("/v1/chat/completions", {"messages": [user("Who?")], "max_tokens": 3})
RESPONSES = ("/v1/responses", {"input": "Who?", "max_output_tokens": 3})


@pytest.fixture
def service(tmp_path: Path) -> Service:
    chat = ChatModel(load_model(wide_model(tmp_path / "tiny"), []))
    return Service(chat, "tiny", ServeOptions())


@pytest.fixture(params=["not finite", "a fault"])
def failing(service: Service, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A service that cannot answer; the code that tells why."""
    if request.param == "not finite":
        service.chat.model.llm.get_output_embeddings().weight.data.fill_(float("nan"))  # type: ignore[operator]
        yield "not_finite"
        return

    def broken() -> None:
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(service.worker.engine, "tick", broken)
    yield "internal_error"


@pytest.mark.parametrize(("path", "body"), [CHAT, RESPONSES], ids=["chat", "responses"])
def test_a_failed_answer_is_an_error_of_the_api_whole_or_streamed(
    service: Service, failing: str, path: str, body: dict[str, Any]
) -> None:
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        whole = client.post(path, json=body)
        streamed = client.post(path, json=body | {"stream": True})
        assert client.get("/health").json() == {"status": "ok"}, "the next question may work"
    assert whole.status_code == 500 and whole.json()["error"]["code"] == failing
    assert "secret" not in whole.text + streamed.text
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    told = events[-1].get("error", events[-1])
    assert told["code"] == failing and told["message"]
    assert b'status="500"' in service.metrics.text()
