"""The watch over one worker outlives whatever that worker makes it raise."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvbaton.v1 import worker_pb2
from services.config.frontend import FrontendConfig
from services.frontend.router import worker as worker_module
from services.frontend.router.worker import Worker
from tests.support.waiting import eventually

RECORD = worker_pb2.WorkerRecord(
    instance_id="w1",
    incarnation=worker_pb2.Incarnation(),
    role=worker_pb2.WORKER_ROLE_DECODE,
    state=worker_pb2.WORKER_STATE_SERVING,
    grpc_endpoint="127.0.0.1:1",
)


async def test_an_unexpected_error_is_a_reason_logged_once_and_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Texts:
        async def get(self, *_: object) -> None:
            asked.append(len(asked))
            if len(asked) <= 3:
                raise KeyError("nobody thought of this")

    async def answer(reply: Any) -> Any:
        return reply

    status = SimpleNamespace(incarnation=RECORD.incarnation, state=worker_pb2.WORKER_STATE_SERVING)
    health = SimpleNamespace(Status=lambda *_, **__: answer(status))
    models = SimpleNamespace(GetModelInfo=lambda *_, **__: answer(SimpleNamespace(info=None)))
    monkeypatch.setattr(worker_module.health_pb2_grpc, "HealthServiceStub", lambda _: health)
    monkeypatch.setattr(worker_module.model_pb2_grpc, "ModelServiceStub", lambda _: models)
    monkeypatch.setattr(worker_module, "_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(Worker, "_until_unwell", lambda _: asyncio.Event().wait())
    reasons: list[str] = []

    texts: Any = Texts()
    with capture_logs() as logs:
        worker = Worker(
            RECORD,
            config=FrontendConfig(link="streams"),
            texts=texts,
            changed=lambda: reasons.append(worker.reason),
            credits_came=lambda _: None,
        )
        await eventually(lambda: worker.routable, what="routable in the end")
        await worker.close()

    assert reasons == ["can't be used: KeyError: 'nobody thought of this'", ""]
    assert len(asked) == 4
    assert [entry["event"] for entry in logs].count("unexpected answer of a worker") == 1
