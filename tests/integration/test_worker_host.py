"""A worker from listening to gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvbaton.client import Bootstrap, Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import bootstrap_pb2, bootstrap_pb2_grpc, model_pb2, model_pb2_grpc, worker_pb2
from services.registry.etcd import EtcdClient
from services.registry.lookup import list_workers
from services.requests import Role
from services.transport import PortTakenError
from tests.support.cluster import FakeCluster
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.ports import free_port
from tests.support.waiting import eventually

GREEDY = SamplingParams(max_new_tokens=8, temperature=0)


async def records(cluster: FakeCluster) -> list[worker_pb2.WorkerRecord]:
    async with EtcdClient(cluster.etcd.endpoints) as client:
        return list(await list_workers(client, cluster.etcd.namespace))


async def grpc_health(endpoint: str) -> health_pb2.HealthCheckResponse.ServingStatus:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status


async def test_health_answers_while_loading_and_requests_get_a_typed_refusal(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, built=False)
    assert await grpc_health(worker.endpoint) == health_pb2.HealthCheckResponse.NOT_SERVING
    async with Client(worker.endpoint) as client:
        assert (await client.status()).state == worker_pb2.WORKER_STATE_LOADING
        with pytest.raises(RequestError) as caught:
            await client.generate(token_ids=[5], sampling=GREEDY)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert caught.value.reason is Reason.WORKER_NOT_SERVING
        assert caught.value.retry_after is not None
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{worker.config.system_port}") as http:
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/live")).status_code == 200
    assert await records(cluster) == []

    worker.host.engine_built(worker.engine)
    await eventually(lambda: _is_serving(worker.endpoint))
    assert worker.engine.probes >= 2, "warm-up of every rank, then once more through the own socket"
    (record,) = await eventually(lambda: records(cluster))
    assert record.state == worker_pb2.WORKER_STATE_SERVING
    assert record.runtime.total_kv_pages == 4096 // 16


async def _is_serving(endpoint: str) -> bool:
    return await grpc_health(endpoint) == health_pb2.HealthCheckResponse.SERVING


async def test_no_record_before_the_bootstrap_server_answers(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.prefill.contract._ATTEMPTS", 1)
    worker = await cluster.start_worker(Role.PREFILL, bootstrap_answers=False)
    assert await asyncio.wait_for(worker.task, 20) == 1, "the worker ends with an error"
    assert await records(cluster) == []


async def test_a_failed_engine_ends_the_worker(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.DECODE, built=False)
    worker.host.engine_failed(RuntimeError("no memory"))
    assert await asyncio.wait_for(worker.task, 10) == 1


async def test_sigterm_order_withdraw_finish_delete(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.1))
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1, 2, 3], sampling=SamplingParams(max_new_tokens=20)))
        await eventually(lambda: worker.engine.live)
        worker.host.stop()
        (record,) = await eventually(lambda: _draining(cluster))
        assert record.instance_id
        await cluster.routable(0)
        answer = await running
        assert answer.token_ids == expected_tokens([1, 2, 3], 20), "what was running has finished"
    assert await asyncio.wait_for(worker.task, 10) == 0
    assert await records(cluster) == []


async def _draining(cluster: FakeCluster) -> list[worker_pb2.WorkerRecord]:
    return [record for record in await records(cluster) if record.state == worker_pb2.WORKER_STATE_DRAINING]


async def test_what_does_not_finish_in_the_drain_ends_with_a_typed_error(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(hang=True), drain_timeout=0.3)
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1], sampling=GREEDY))
        await eventually(lambda: worker.engine.live)
        worker.host.stop()
        with pytest.raises(RequestError) as caught:
            await running
        assert caught.value.reason is Reason.SHUTTING_DOWN


async def test_a_dead_engine_withdraws_the_worker_and_ends_its_requests(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(hang=True))
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1], sampling=GREEDY))
        await eventually(lambda: worker.engine.live)
        worker.engine.die("scheduler killed")
        with pytest.raises(RequestError) as caught:
            await running
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert caught.value.reason is Reason.ENGINE_DEAD
    assert await asyncio.wait_for(worker.task, 10) == 1
    assert await records(cluster) == []


async def test_cancelling_the_call_aborts_in_the_engine(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.05))
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        async for _ in client.stream(token_ids=[1], sampling=SamplingParams(max_new_tokens=200)):
            break
    await eventually(lambda: not worker.engine.live)
    assert worker.engine.aborted == [worker.engine.seen[-1].engine_id]


async def test_abort_by_id_ends_the_stream_with_cancelled(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(hang=True))
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1], sampling=GREEDY, request_id="mine"))
        await eventually(lambda: worker.engine.live)
        with pytest.raises(RequestError) as duplicate:
            await client.generate(token_ids=[1], sampling=GREEDY, request_id="mine")
        assert duplicate.value.code is grpc.StatusCode.ALREADY_EXISTS
        assert await client.abort("mine")
        with pytest.raises(RequestError) as caught:
            await running
        assert caught.value.code is grpc.StatusCode.CANCELLED
        assert not await client.abort("unknown")


async def test_an_older_process_does_not_take_a_newer_ones_place(cluster: FakeCluster) -> None:
    older = await cluster.start_worker(Role.AGGREGATED, built=False, instance_id="same")
    newer = await cluster.start_worker(Role.AGGREGATED, instance_id="same")
    (before,) = await eventually(lambda: records(cluster))
    older.host.engine_built(older.engine)
    assert await asyncio.wait_for(older.task, 10) == 1
    (after,) = await records(cluster)
    assert before.incarnation == after.incarnation
    assert not newer.task.done()


async def test_a_replaced_worker_finishes_what_it_runs(cluster: FakeCluster) -> None:
    older = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.1), instance_id="same")
    await cluster.routable(1)
    async with Client(older.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1, 2], sampling=SamplingParams(max_new_tokens=60)))
        await eventually(lambda: older.engine.live)
        await cluster.start_worker(Role.AGGREGATED, instance_id="same")
        assert (await running).token_ids == expected_tokens([1, 2], 60)
    assert await asyncio.wait_for(older.task, 20) == 1


async def test_a_dead_engine_is_noticed_while_etcd_does_not_answer(model_folder: Path) -> None:
    nowhere = FakeCluster(f"127.0.0.1:{free_port()}", "t-nowhere", model_folder)
    async with nowhere as cluster:
        worker = await cluster.start_worker(Role.AGGREGATED)
        await eventually(lambda: _is_serving(worker.endpoint))
        worker.engine.die("scheduler killed")
        assert await asyncio.wait_for(worker.task, 9) == 1, "well before the first publish gives up"


@pytest.mark.parametrize("name", ["Worker_1", "a/b", "x" * 64])
async def test_a_name_that_is_no_key_is_refused_before_anything_is_loaded(cluster: FakeCluster, name: str) -> None:
    with pytest.raises(ValueError, match="instance"):
        await cluster.start_worker(Role.AGGREGATED, instance_id=name)


async def test_a_request_cannot_point_decode_at_an_address_of_its_own(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    async with Client(decode.endpoint) as client:
        for host, port in (
            ("127.0.0.1", free_port()),
            ("2.2.2.2", prefill.config.disaggregation_bootstrap_port),
            ("evil.example/x?y#", 80),
        ):
            with pytest.raises(RequestError) as caught:
                await client.generate(token_ids=[1], sampling=GREEDY, bootstrap=Bootstrap(host=host, port=port, room=5))
            assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "bootstrap.host")
    assert decode.engine.seen == []


async def test_a_second_signal_cuts_the_drain_short(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(hang=True))
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1], sampling=GREEDY))
        await eventually(lambda: worker.engine.live)
        worker.host.stop()
        worker.host.hurry()
        with pytest.raises(RequestError) as caught:
            await asyncio.wait_for(running, 5)
        assert caught.value.reason is Reason.SHUTTING_DOWN
    assert await asyncio.wait_for(worker.task, 10) == 0


async def test_check_peer_refuses_what_is_no_name(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    async with grpc.aio.insecure_channel(decode.endpoint) as channel:
        stub = bootstrap_pb2_grpc.BootstrapServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CheckPeer(bootstrap_pb2.CheckPeerRequest(instance_id="a/b"))
    error = RequestError.from_rpc_error(caught.value)
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "instance_id")


async def test_bootstrap_service_answers_by_role(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    (prefill_record,) = [r for r in await records(cluster) if r.role == worker_pb2.WORKER_ROLE_PREFILL]
    async with (
        grpc.aio.insecure_channel(prefill.endpoint) as to_prefill,
        grpc.aio.insecure_channel(decode.endpoint) as to_decode,
    ):
        on_prefill = bootstrap_pb2_grpc.BootstrapServiceStub(to_prefill)
        on_decode = bootstrap_pb2_grpc.BootstrapServiceStub(to_decode)
        endpoint = (await on_prefill.GetEndpoint(bootstrap_pb2.GetEndpointRequest())).endpoint
        assert endpoint.port == prefill.config.disaggregation_bootstrap_port
        good = bootstrap_pb2.CheckPeerRequest(
            instance_id=prefill_record.instance_id, incarnation=prefill_record.incarnation
        )
        assert (await on_decode.CheckPeer(good)).endpoint == endpoint

        async def refused(call: grpc.aio.UnaryUnaryCall) -> RequestError:  # type: ignore[type-arg]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            return RequestError.from_rpc_error(caught.value)

        old = bootstrap_pb2.CheckPeerRequest(
            instance_id=prefill_record.instance_id, incarnation=worker_pb2.Incarnation(created_us=1, uuid="0" * 32)
        )
        assert (await refused(on_decode.CheckPeer(old))).reason is Reason.PEER_REPLACED
        unknown = bootstrap_pb2.CheckPeerRequest(instance_id="nobody")
        assert (await refused(on_decode.CheckPeer(unknown))).code is grpc.StatusCode.NOT_FOUND
        assert (await refused(on_prefill.CheckPeer(good))).reason is Reason.WRONG_ROLE
        assert (await refused(on_decode.GetEndpoint(bootstrap_pb2.GetEndpointRequest()))).reason is Reason.WRONG_ROLE


async def test_the_tokenizer_arrives_whole(cluster: FakeCluster, model_folder: object) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)
    files: dict[str, bytes] = {}
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        async for chunk in model_pb2_grpc.ModelServiceStub(channel).GetTokenizer(model_pb2.GetTokenizerRequest()):
            files[chunk.file_name] = files.get(chunk.file_name, b"") + chunk.data
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    for name, content in files.items():
        assert content == (model_folder / name).read_bytes()  # type: ignore[operator]


async def test_a_taken_port_is_an_error_that_names_the_flag(cluster: FakeCluster) -> None:
    first = await cluster.start_worker(Role.AGGREGATED)
    with pytest.raises(PortTakenError, match="--port"):
        await cluster.start_worker(Role.AGGREGATED, port=first.config.port)
    with pytest.raises(PortTakenError, match="--system-port"):
        await cluster.start_worker(Role.AGGREGATED, system_port=first.config.system_port)
