"""One etcd watch stream: what it delivers, and how it ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Self

import aetcd.rpc as _aetcd_rpc  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
import grpc
import grpc.aio

_rpc: Any = _aetcd_rpc


class WatchEndedError(Exception):
    """The stream broke, or etcd cancelled the watch. What happened since the last batch is unknown."""


class WatchCompactedError(WatchEndedError):
    """The revisions asked for no longer exist."""


@dataclass(frozen=True, slots=True)
class KeyPut:
    """A key was written."""

    key: str
    value: bytes
    mod_revision: int


@dataclass(frozen=True, slots=True)
class KeyDeleted:
    """A key was deleted, by a client or with its lease."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """One message. Without events it is a sign of life, at store revision `revision`.

    That revision is no place to resume from: etcd before 3.5.8 may answer a progress request ahead of older events.
    """

    revision: int
    events: tuple[KeyPut | KeyDeleted, ...]


class WatchStream:
    """An open watch. `receive` and `request_progress` raise WatchEndedError once it is over."""

    def __init__(self, call: Any, revision: int) -> None:
        self._call = call
        self._reading: asyncio.Task[Any] | None = None
        self.revision = revision
        """Store revision at which etcd created the watch."""

    @classmethod
    async def open(cls, call: Any, request: Any, limit: float) -> Self:
        """Creates the watch within `limit` seconds; raises what gRPC raises, TimeoutError, or WatchEndedError."""
        try:
            async with asyncio.timeout(limit):
                await call.write(request)
                response = await call.read()
            return cls(call, _checked(response).header.revision)
        except BaseException:
            call.cancel()
            raise

    async def receive(self, patience: float) -> WatchBatch | None:
        """The next batch; None when `patience` seconds passed without one."""
        # Cancelling a read ends the whole call, so an unanswered read is kept for the next time.
        reading = self._reading or asyncio.ensure_future(self._call.read())
        self._reading = reading
        done, _ = await asyncio.wait({reading}, timeout=patience)
        if not done:
            return None
        self._reading = None
        try:
            response = _checked(reading.result())
        except (grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError) as error:
            raise WatchEndedError(_reason(error)) from error
        return WatchBatch(response.header.revision, tuple(_event(event) for event in response.events))

    async def request_progress(self, limit: float) -> None:
        """Asks etcd for a sign of life, which `receive` then delivers."""
        try:
            async with asyncio.timeout(limit):
                await self._call.write(_rpc.WatchRequest(progress_request=_rpc.WatchProgressRequest()))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            raise WatchEndedError(_reason(error)) from error

    async def close(self) -> None:
        self._call.cancel()
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def _checked(response: Any) -> Any:
    if response is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
        raise WatchEndedError("etcd ended the watch stream")
    if response.canceled and response.compact_revision:
        raise WatchCompactedError(f"etcd compacted up to revision {response.compact_revision}")
    if response.canceled:
        raise WatchEndedError(f"etcd cancelled the watch: {response.cancel_reason or 'no reason given'}")
    return response


def _event(event: Any) -> KeyPut | KeyDeleted:
    key = event.kv.key.decode(errors="replace")
    if event.type == _rpc.Event.DELETE:
        return KeyDeleted(key, event.kv.mod_revision)
    return KeyPut(key, event.kv.value, event.kv.mod_revision)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return str(error) or type(error).__name__
