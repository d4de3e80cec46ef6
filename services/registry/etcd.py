"""How does Baton talk to etcd?

aetcd's generated stubs on our own channels: its high-level client has no TLS, one endpoint and no deadlines. Every
call here ends within its deadline, with an answer or an `EtcdError`. Messages stay inside; callers get dataclasses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import aetcd.rpc as _aetcd_rpc  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
import grpc
import grpc.aio

from services.registry.watch import WatchStream
from services.transport import TlsConfig, make_channel

_rpc: Any = _aetcd_rpc

_Answer = TypeVar("_Answer")

# etcd refuses pings closer than 5 s apart (--grpc-keepalive-min-time).
_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", 5500),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# A member cut off from its quorum then ends the stream instead of keeping silent.
_METADATA = (("hasleader", "true"),)
_ELSEWHERE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class EtcdError(Exception):
    """A call to etcd failed."""


class EtcdUnavailableError(EtcdError):
    """No endpoint answered within the deadline."""


class EtcdRequestError(EtcdError):
    """etcd answered, and refused."""


class LeaseNotFoundError(EtcdError):
    """The lease has expired, was revoked, or etcd lost its data."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as etcd holds it. `lease` is 0 for none."""

    key: str
    value: bytes
    mod_revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Every key under a prefix, as of one store revision."""

    revision: int
    items: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class EtcdStatus:
    """What one endpoint says of itself. `leader` is 0 without a quorum."""

    endpoint: str
    version: str
    leader: int
    revision: int
    member_names: tuple[str, ...]


class EtcdClient:
    """An etcd cluster. Stays on one endpoint until that fails, then goes to the next; refused by all, it fails at once.

    `endpoints` are host:port, with or without http(s)://; `deadline` is seconds per call over all endpoints together.
    Use within one event loop; close it (or use it as an async context manager).
    """

    def __init__(self, endpoints: Sequence[str], tls: TlsConfig | None = None, *, deadline: float = 3.0) -> None:
        if not endpoints:
            raise ValueError("etcd needs at least one endpoint")
        schemes = {endpoint.partition("://")[0] for endpoint in endpoints if "://" in endpoint}
        if schemes - {"http", "https"} or len(schemes) > 1:
            raise ValueError(f"etcd endpoints must be all http or all https, not {', '.join(sorted(schemes))}")
        if schemes == {"http"} and tls is not None:
            raise ValueError("etcd endpoints say http, but TLS is configured")
        if schemes == {"https"} and tls is None:
            tls = TlsConfig()
        self._targets = tuple(endpoint.rpartition("://")[2].rstrip("/") for endpoint in endpoints)
        self._tls = tls
        self._deadline = deadline
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channels; calls in flight and later ones fail with EtcdUnavailableError."""
        self._closed = True
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            await channel.close()

    @property
    def endpoint(self) -> str:
        """host:port of the endpoint that the next call goes to."""
        return self._targets[self._current]

    async def get(self, key: str, *, deadline: float | None = None) -> KeyValue | None:
        """The key's value, read through the quorum; None when there is none."""
        request = _rpc.RangeRequest(key=key.encode())
        response = await self._call(lambda channel: _rpc.KVStub(channel).Range, request, deadline)
        return _key_value(response.kvs[0]) if response.kvs else None

    async def list_prefix(self, prefix: str, *, deadline: float | None = None) -> Listing:
        """Every key that starts with `prefix`, read through the quorum."""
        request = _rpc.RangeRequest(key=prefix.encode(), range_end=prefix_end(prefix))
        response = await self._call(lambda channel: _rpc.KVStub(channel).Range, request, deadline)
        return Listing(response.header.revision, tuple(_key_value(item) for item in response.kvs))

    async def put_if(
        self, key: str, value: bytes, *, lease: int, mod_revision: int, deadline: float | None = None
    ) -> bool:
        """Puts only while the key's modification revision is `mod_revision` (0: there is no such key).

        False when it is another one. Raises LeaseNotFoundError when there is no such lease.
        """
        put = _rpc.RequestOp(request_put=_rpc.PutRequest(key=key.encode(), value=value, lease=lease))
        return await self._transact(key, mod_revision, put, deadline)

    async def delete_if(self, key: str, *, mod_revision: int, deadline: float | None = None) -> bool:
        """Deletes only while the key's modification revision is `mod_revision`; False when it is another one."""
        delete = _rpc.RequestOp(request_delete_range=_rpc.DeleteRangeRequest(key=key.encode()))
        return await self._transact(key, mod_revision, delete, deadline)

    async def grant_lease(self, ttl: int, *, deadline: float | None = None) -> int:
        """A new lease of `ttl` seconds; its id."""
        request = _rpc.LeaseGrantRequest(TTL=ttl)
        response = await self._call(lambda channel: _rpc.LeaseStub(channel).LeaseGrant, request, deadline)
        return int(response.ID)

    async def renew_lease(self, lease: int, *, deadline: float | None = None) -> None:
        """Sets the lease's remaining time back to its TTL. Raises LeaseNotFoundError when it is gone."""
        request = _rpc.LeaseKeepAliveRequest(ID=lease)
        response = await self._on_some_endpoint(lambda channel, limit: _renew(channel, request, limit), deadline)
        if response.TTL <= 0:
            raise LeaseNotFoundError(f"lease {lease:x} has expired")

    async def revoke_lease(self, lease: int, *, deadline: float | None = None) -> None:
        """Ends the lease and deletes its keys. Raises LeaseNotFoundError when it is gone."""
        request = _rpc.LeaseRevokeRequest(ID=lease)
        await self._call(lambda channel: _rpc.LeaseStub(channel).LeaseRevoke, request, deadline)

    async def status(self, *, deadline: float | None = None) -> EtcdStatus:
        """Version, leader and members as the current endpoint sees them."""
        endpoint = self.endpoint
        status = await self._call(lambda channel: _rpc.MaintenanceStub(channel).Status, _rpc.StatusRequest(), deadline)
        members = await self._call(
            lambda channel: _rpc.ClusterStub(channel).MemberList, _rpc.MemberListRequest(), deadline
        )
        names = tuple(str(member.name) for member in members.members)
        return EtcdStatus(endpoint, status.version, status.leader, status.header.revision, names)

    async def watch_prefix(self, prefix: str, start_revision: int, *, deadline: float | None = None) -> WatchStream:
        """A watch on every key under `prefix`, from `start_revision` on. The caller closes it."""
        request = _rpc.WatchRequest(
            create_request=_rpc.WatchCreateRequest(
                key=prefix.encode(), range_end=prefix_end(prefix), start_revision=start_revision
            )
        )

        async def attempt(channel: grpc.aio.Channel, limit: float) -> WatchStream:
            return await WatchStream.open(_rpc.WatchStub(channel).Watch(metadata=_METADATA), request, limit)

        return await self._on_some_endpoint(attempt, deadline)

    def leave_endpoint(self, endpoint: str) -> None:
        """Says that `endpoint` failed the caller in a way that no call shows, such as a silent stream."""
        if endpoint == self.endpoint:
            self._current = (self._current + 1) % len(self._targets)

    async def _transact(self, key: str, mod_revision: int, operation: Any, deadline: float | None) -> bool:
        condition = _rpc.Compare(
            key=key.encode(), target=_rpc.Compare.MOD, result=_rpc.Compare.EQUAL, mod_revision=mod_revision
        )
        request = _rpc.TxnRequest(compare=[condition], success=[operation])
        response = await self._call(lambda channel: _rpc.KVStub(channel).Txn, request, deadline)
        return bool(response.succeeded)

    async def _call(self, method: Callable[[grpc.aio.Channel], Any], request: Any, deadline: float | None) -> Any:
        async def attempt(channel: grpc.aio.Channel, limit: float) -> Any:
            return await method(channel)(request, timeout=limit, metadata=_METADATA)

        return await self._on_some_endpoint(attempt, deadline)

    async def _on_some_endpoint(
        self, attempt: Callable[[grpc.aio.Channel, float], Awaitable[_Answer]], deadline: float | None
    ) -> _Answer:
        """One attempt per endpoint, each with an equal share of the deadline."""
        if self._closed:
            raise EtcdUnavailableError("the client is closed")
        limit = (deadline or self._deadline) / len(self._targets)
        failures: list[str] = []
        for _ in self._targets:
            endpoint = self.endpoint
            try:
                return await attempt(self._channel(endpoint), limit)
            except grpc.aio.AioRpcError as error:
                text = f"{endpoint}: {error.code().name} {error.details()}"
                if error.code() is grpc.StatusCode.NOT_FOUND and "lease" in (error.details() or ""):
                    raise LeaseNotFoundError(text) from error
                if error.code() not in _ELSEWHERE:
                    raise EtcdRequestError(text) from error
                failures.append(text)
            except TimeoutError:
                failures.append(f"{endpoint}: no answer in {limit:.1f} s")
            except asyncio.InvalidStateError as error:
                failures.append(f"{endpoint}: {error}")
            except asyncio.CancelledError:
                # Closing a channel cancels the calls on it as if their task had been cancelled.
                if self._closed and not _task_is_cancelled():
                    raise EtcdUnavailableError("the client was closed") from None
                raise
            self.leave_endpoint(endpoint)
        raise EtcdUnavailableError("; ".join(failures))

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        channel = self._channels.get(endpoint)
        if channel is None:
            channel = make_channel(endpoint, tls=self._tls, options=_CHANNEL_OPTIONS)
            self._channels[endpoint] = channel
        return channel


async def _renew(channel: grpc.aio.Channel, request: Any, limit: float) -> Any:
    """One renewal is a stream of one message each way, so that each has a deadline and an endpoint of its own."""
    call = _rpc.LeaseStub(channel).LeaseKeepAlive(timeout=limit, metadata=_METADATA)
    try:
        # Not only gRPC's timeout: a write waits for ever when its channel is closed before it connected.
        async with asyncio.timeout(limit):
            await call.write(request)
            response = await call.read()
        if response is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
            raise EtcdRequestError("etcd ended a lease renewal without an answer")
        return response
    finally:
        call.cancel()


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def prefix_end(prefix: str) -> bytes:
    """The end of the range that holds exactly the keys starting with `prefix`."""
    raw = bytearray(prefix.encode())
    raw[-1] += 1  # keys are ASCII and never empty
    return bytes(raw)


def _key_value(item: Any) -> KeyValue:
    return KeyValue(item.key.decode(errors="replace"), item.value, item.mod_revision, item.lease)
