"""API keys and limits of a whole frontend: HTTP with the official SDK and gRPC, one limiter for both, real legs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import structlog
from structlog.testing import capture_logs

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from services.config.limits import AccessFlags, LimitFlags
from services.frontend.access.keys import as_entry, digest_of, fresh_key
from services.requests import Role
from tests.support.cluster import MODEL, FakeCluster
from tests.support.fake_engine import Behaviour
from tests.support.processes import Processes
from tests.support.waiting import eventually

PROMPT = [5, 6, 7]
ALICE, BOB = fresh_key(), fresh_key()


class KeyedCluster:
    """A cluster whose frontend asks for keys: alice may have one request at once, bob may use another model."""

    def __init__(self, cluster: FakeCluster, keys: Path) -> None:
        self.cluster = cluster
        self._keys = keys

    def write_keys(self, alice: str = ALICE) -> None:
        text = as_entry("alice", digest_of(alice.encode())) + "  concurrent_requests: 1\n"
        text += as_entry("bob", digest_of(BOB.encode())) + "  models: [another]\n"
        new = self._keys.with_suffix(".new")
        new.write_text(text)
        new.rename(self._keys)

    def spoil_keys(self) -> None:
        self._keys.write_text("- name: nobody\n")

    def sdk(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=key, base_url=f"{self.http_url}/v1", max_retries=0)

    def grpc(self, key: str) -> Client:
        return Client(f"127.0.0.1:{self.cluster.frontend.grpc_port}", timeout=20.0, api_key=key)

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.cluster.frontend.http_port}"


@asynccontextmanager
async def keyed(
    etcd_endpoint: str, model_folder: Path, tmp_path: Path, **limits: object
) -> AsyncGenerator[KeyedCluster]:
    keys = tmp_path / "keys.yaml"
    inner = FakeCluster(
        etcd_endpoint,
        f"t-{uuid.uuid4().hex[:12]}",
        model_folder,
        heartbeat=2.0,
        access=AccessFlags(api_keys=keys),
        limits=LimitFlags(**limits),  # type: ignore[arg-type]
    )
    cluster = KeyedCluster(inner, keys)
    cluster.write_keys()
    async with inner:
        yield cluster


@pytest.fixture
async def cluster(etcd_endpoint: str, model_folder: Path, tmp_path: Path) -> AsyncGenerator[KeyedCluster]:
    async with keyed(etcd_endpoint, model_folder, tmp_path) as cluster:
        yield cluster


async def refused(cluster: KeyedCluster, key: str) -> RequestError:
    async with cluster.grpc(key) as client:
        with pytest.raises(RequestError) as caught:
            await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=1), model=MODEL)
    return caught.value


async def test_who_has_no_key_gets_nothing_but_health(cluster: KeyedCluster) -> None:
    prefill, decode = await cluster.cluster.start_pair()
    with pytest.raises(openai.AuthenticationError):
        await cluster.sdk("kvb-wrong").completions.create(model=MODEL, prompt="Hi")
    assert (await refused(cluster, "")).reason is Reason.API_KEY_MISSING
    async with cluster.grpc("") as client:
        with pytest.raises(RequestError) as caught:
            await client.status()
        assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    async with httpx.AsyncClient(base_url=cluster.http_url) as http:
        assert (await http.get("/health")).json()["models"] == [MODEL]
        assert "kvbaton_refused_by_access_total" in (await http.get("/metrics")).text
    assert prefill.engine.seen == decode.engine.seen == []


async def test_a_key_opens_both_edges(cluster: KeyedCluster) -> None:
    await cluster.cluster.start_pair()
    answer = await cluster.sdk(ALICE).completions.create(model=MODEL, prompt="Hi", max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    async with cluster.grpc(ALICE) as client:
        assert len((await client.generate(text="Hi", sampling=SamplingParams(max_new_tokens=4))).token_ids) == 4
        assert (await client.status()).workers


async def test_the_key_for_another_model(cluster: KeyedCluster) -> None:
    prefill, _ = await cluster.cluster.start_pair()
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await cluster.sdk(BOB).completions.create(model=MODEL, prompt="Hi")
    assert caught.value.param == "model"
    assert (await refused(cluster, BOB)).code is grpc.StatusCode.PERMISSION_DENIED
    assert [model.id async for model in cluster.sdk(BOB).models.list()] == []
    assert prefill.engine.seen == []


async def test_both_edges_share_one_limit_and_a_stream_holds_it_to_its_end(cluster: KeyedCluster) -> None:
    for role in (Role.PREFILL, Role.DECODE):
        await cluster.cluster.start_worker(role, Behaviour(token_seconds=0.05))
    await cluster.cluster.routable(2)
    stream = await cluster.sdk(ALICE).completions.create(model=MODEL, prompt="Hi", max_tokens=200, stream=True)
    events = aiter(stream)
    await anext(events)
    error = await refused(cluster, ALICE)
    assert (error.reason, error.retry_after) == (Reason.CONCURRENCY_LIMIT_EXCEEDED, 1.0)
    with pytest.raises(openai.RateLimitError) as caught:
        await cluster.sdk(ALICE).completions.create(model=MODEL, prompt="Hi")
    assert caught.value.response.headers["retry-after"] == "1"
    await stream.close()
    async with cluster.grpc(ALICE) as client:

        async def again() -> bool:
            try:
                await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=1))
            except RequestError:
                return False
            return True

        await eventually(again, within=5.0, what="a place, once the stream was left")


async def test_new_keys_count_without_a_restart_and_bad_ones_never(cluster: KeyedCluster) -> None:
    await cluster.cluster.start_pair()
    cluster.spoil_keys()
    cluster.cluster.frontend.reload_keys()
    await asyncio.sleep(0.3)
    await cluster.sdk(ALICE).models.list()
    cluster.write_keys(alice="kvb-new")
    cluster.cluster.frontend.reload_keys()

    async def opened() -> bool:
        try:
            await cluster.sdk("kvb-new").models.list()
        except openai.AuthenticationError:
            return False
        return True

    await eventually(opened, within=5.0, what="the new key")
    with pytest.raises(openai.AuthenticationError):
        await cluster.sdk(ALICE).models.list()


async def test_log_lines_name_the_key_and_never_hold_it(cluster: KeyedCluster) -> None:
    await cluster.cluster.start_pair()
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        await cluster.sdk(ALICE).completions.create(model=MODEL, prompt="Hi", max_tokens=2)
        async with cluster.grpc(ALICE) as client:
            await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=2))
        await eventually(lambda: sum(line["event"] == "request ended" for line in logs) == 2)
    assert [line["key_name"] for line in logs if line["event"] == "request ended"] == ["alice", "alice"]
    assert ALICE not in str(logs)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_half_closed_socket_frees_both_legs(cluster: KeyedCluster, stream: bool) -> None:
    """shutdown(SHUT_WR) looks like a client that left; nothing tells the two apart before something is written."""
    prefill = await cluster.cluster.start_worker(Role.PREFILL)
    decode = await cluster.cluster.start_worker(Role.DECODE, Behaviour(token_seconds=0.05))
    await cluster.cluster.routable(2)
    body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 200, "stream": stream})
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.cluster.frontend.http_port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: e\r\nauthorization: Bearer {ALICE}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with capture_logs() as logs:
        writer.write((head + body).encode())
        await eventually(lambda: decode.engine.live, what="decode to run")
        writer.write_eof()
        await eventually(
            lambda: not decode.engine.live and not prefill.engine.live, within=3.0, what="both legs to end"
        )
        await eventually(lambda: any(line["event"] == "request ended" for line in logs))
    assert len(decode.engine.aborted) == 1
    assert [line["outcome"] for line in logs if line["event"] == "request ended"] == ["CANCELLED"]
    async with asyncio.timeout(5):
        await reader.read()
    writer.close()


async def test_without_workers_and_while_draining_it_is_503_with_retry_after(cluster: KeyedCluster) -> None:
    async def status() -> tuple[int, str, bool]:
        with pytest.raises(openai.InternalServerError) as caught:
            await cluster.sdk(ALICE).completions.create(model=MODEL, prompt="Hi")
        response = caught.value.response
        async with httpx.AsyncClient(base_url=cluster.http_url) as http:
            assert (await http.get("/health")).status_code == 503
        return response.status_code, str(caught.value.code), int(response.headers["retry-after"]) >= 1

    assert await status() == (503, "no_worker", True)
    await cluster.cluster.start_pair()
    await cluster.cluster.frontend.drain()
    assert await status() == (503, "shutting_down", True)


async def test_an_operators_limit_on_prompts_names_the_field(
    etcd_endpoint: str, model_folder: Path, tmp_path: Path
) -> None:
    async with keyed(etcd_endpoint, model_folder, tmp_path, max_prompt_tokens=10) as cluster:
        await cluster.cluster.start_pair()
        sdk = cluster.sdk(ALICE)
        await sdk.completions.create(model=MODEL, prompt=[1] * 10, max_tokens=20)
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.completions.create(model=MODEL, prompt=[1] * 11, max_tokens=1)
        assert caught.value.param == "prompt"
        async with cluster.grpc(ALICE) as client:
            with pytest.raises(RequestError) as error:
                await client.generate(token_ids=[1] * 11)
            assert error.value.field == "token_ids"


async def test_a_large_request_is_refused_by_both_edges(etcd_endpoint: str, model_folder: Path, tmp_path: Path) -> None:
    async with keyed(etcd_endpoint, model_folder, tmp_path, max_body_bytes=100_000) as cluster:
        await cluster.cluster.start_pair()
        with pytest.raises(openai.APIStatusError) as caught:
            await cluster.sdk(ALICE).completions.create(model=MODEL, prompt="x" * 5_000_000)
        assert caught.value.status_code == 413
        async with cluster.grpc(ALICE) as client:
            with pytest.raises(RequestError) as error:
                await client.generate(text="x" * 5_000_000)
            assert error.value.reason is Reason.MESSAGE_TOO_LARGE
            assert (await client.generate(text="Hi", sampling=SamplingParams(max_new_tokens=1))).token_ids


async def test_the_process_refuses_a_bad_file_and_reads_a_good_one_again_on_sighup(
    etcd_endpoint: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text('- {name: alice, sha256: "12"}\n')
    bad = Processes(etcd_endpoint, tmp_path)
    bad.frontend("--api-keys", str(keys), name="bad")
    await eventually(lambda: bad.processes["bad"].poll() is not None, within=20.0, what="the process to end")
    assert bad.processes["bad"].returncode == 2
    assert f"--api-keys {keys}: entry 1 (alice): sha256: not 64 hexadecimal digits" in bad.log("bad")
    assert "Traceback" not in bad.log("bad")

    keys.write_text(as_entry("alice", digest_of(ALICE.encode())))
    good = Processes(etcd_endpoint, tmp_path, {"KVBATON_API_KEYS": str(keys)})
    good.frontend()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{good.http_port}") as http:

            async def status(key: str) -> int:
                try:
                    response = await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
                except httpx.TransportError:
                    return 0
                return response.status_code

            async def opened(key: str) -> bool:
                return await status(key) == 200

            await eventually(lambda: opened(ALICE), within=20.0, what="the frontend")
            assert await status(BOB) == 401
            keys.write_text(as_entry("bob", digest_of(BOB.encode())))
            os.kill(good.pid("frontend"), signal.SIGHUP)
            await eventually(lambda: opened(BOB), within=5.0, what="the new key")
            assert await status(ALICE) == 401
    finally:
        good.kill("frontend")
    assert ALICE not in good.log("frontend")
