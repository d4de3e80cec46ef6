"""TLS and mTLS between all processes, by flags, with throw-away certificates."""

from __future__ import annotations

import ssl
import uuid
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from services.config.common import TlsFlags
from services.requests import Role
from tests.support.certificates import Authority
from tests.support.cluster import MODEL, FakeCluster
from tests.support.fake_engine import expected_tokens

GREEDY = SamplingParams(max_new_tokens=4, temperature=0)


class TlsCluster(FakeCluster):
    """Every process has the same certificate and trusts the same authority."""

    def __init__(self, etcd_endpoint: str, model_folder: Path, tls: TlsFlags) -> None:
        super().__init__(etcd_endpoint, f"t-{uuid.uuid4().hex[:12]}", model_folder)
        self.tls = tls
        self._frontend_config = replace(self._frontend_config, tls=tls)

    def connect(self) -> Client:
        return Client(
            f"127.0.0.1:{self.frontend.grpc_port}",
            timeout=20.0,
            ca=self.tls.tls_ca,
            cert=self.tls.tls_cert,
            key=self.tls.tls_key,
        )


@pytest.mark.parametrize("mutual", [False, True])
async def test_a_request_through_encrypted_hops(
    etcd_endpoint: str, model_folder: Path, tmp_path: Path, mutual: bool
) -> None:
    authority, stranger = Authority(tmp_path, "ours"), Authority(tmp_path, "strangers")
    cert, key = authority.issue("process")
    foreign_cert, foreign_key = stranger.issue("intruder")
    tls = TlsFlags(tls_cert=cert, tls_key=key, tls_ca=authority.ca, tls_client_auth=mutual)
    async with TlsCluster(etcd_endpoint, model_folder, tls) as cluster:
        for role in (Role.PREFILL, Role.DECODE):
            await cluster.start_worker(role, tls=tls)
        await cluster.routable(2)
        answer = await cluster.client.generate(token_ids=[1, 2], sampling=GREEDY)
        assert answer.token_ids == expected_tokens([1, 2], 4)

        target = f"127.0.0.1:{cluster.frontend.grpc_port}"
        refused = [Client(target, call_timeout=3), Client(target, call_timeout=3, ca=stranger.ca)]
        if mutual:
            refused.append(Client(target, call_timeout=3, ca=authority.ca))
            refused.append(Client(target, call_timeout=3, ca=authority.ca, cert=foreign_cert, key=foreign_key))
        for client in refused:
            async with client:
                with pytest.raises(RequestError) as caught:
                    await client.status()
                assert caught.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def https(tls: TlsFlags, *, with_certificate: bool) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=str(tls.tls_ca))
    if with_certificate:
        assert tls.tls_cert is not None
        context.load_cert_chain(tls.tls_cert, tls.tls_key)
    return httpx.AsyncClient(verify=context, timeout=10, trust_env=False)


@pytest.mark.parametrize("mutual", [False, True])
async def test_http_has_the_tls_that_grpc_has(
    etcd_endpoint: str, model_folder: Path, tmp_path: Path, mutual: bool
) -> None:
    authority = Authority(tmp_path, "ours")
    cert, key = authority.issue("process")
    tls = TlsFlags(tls_cert=cert, tls_key=key, tls_ca=authority.ca, tls_client_auth=mutual)
    async with TlsCluster(etcd_endpoint, model_folder, tls) as cluster:
        await cluster.start_worker(Role.AGGREGATED, tls=tls)
        await cluster.routable(1)
        origin = f"127.0.0.1:{cluster.frontend.http_port}"
        body = {"model": MODEL, "prompt": [1, 2], "max_tokens": 2, "temperature": 0}

        async with https(tls, with_certificate=True) as client:
            answer = await client.post(f"https://{origin}/v1/completions", json=body)
            assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 2)

        async with https(tls, with_certificate=False) as client:
            if mutual:
                with pytest.raises(httpx.TransportError):
                    await client.get(f"https://{origin}/live")
            else:
                assert (await client.get(f"https://{origin}/live")).status_code == 200
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://{origin}/live")

        # Probes bring no certificate: a worker's system port is plain text.
        system_port = cluster.workers[0].config.system_port
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{system_port}/live")).status_code == 200


async def test_client_certificates_without_an_own_one_are_refused(
    etcd_endpoint: str, model_folder: Path, tmp_path: Path
) -> None:
    """Not plain text instead: every process is a server, and this one could not speak TLS."""
    tls = TlsFlags(tls_ca=Authority(tmp_path, "ours").ca, tls_client_auth=True)
    with pytest.raises(ValueError, match=r"--tls-client-auth .*--tls-cert"):
        async with TlsCluster(etcd_endpoint, model_folder, tls):
            pass
