"""TLS and mTLS between all processes, by flags, with throw-away certificates."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from services.config.common import TlsFlags
from services.requests import Role
from tests.support.certificates import Authority
from tests.support.cluster import FakeCluster
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
