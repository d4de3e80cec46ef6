"""Keeps one etcd lease alive, and gets a new one when it is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from services.registry.backoff import Backoff
from services.registry.etcd import EtcdClient, EtcdError, LeaseNotFoundError

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseState:
    """`alive`: renewed within its TTL. `renewed_age`: seconds since the last renewal, None before the first."""

    lease: int | None
    alive: bool
    renewed_age: float | None


class LeaseKeeper:
    """Renews a lease of `ttl` seconds every third of it, for as long as the context is open.

    A lease is given up only when etcd says that it is gone; while etcd is unreachable the old one is retried, since a
    restarted etcd gives every lease its full time again. Nothing raises into the owner: `state()` shows trouble, and
    `on_new_lease` is called with every new lease, whose keys must then be put again.
    """

    def __init__(self, client: EtcdClient, *, ttl: int = 10) -> None:
        if ttl < 1:
            raise ValueError("a lease lasts at least one second")
        self._client = client
        self._ttl = ttl
        self._lease: int | None = None
        self._renewed_at: float | None = None
        self._troubled_since: float | None = None
        self._granted = asyncio.Event()
        self._hurry = asyncio.Event()
        self._listeners: list[Callable[[int], None]] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="lease-keeper")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def ttl(self) -> int:
        """Seconds."""
        return self._ttl

    def state(self) -> LeaseState:
        age = None if self._renewed_at is None else time.monotonic() - self._renewed_at
        return LeaseState(self._lease, self._lease is not None and age is not None and age < self._ttl, age)

    def on_new_lease(self, listener: Callable[[int], None]) -> None:
        """`listener` is called in the event loop with the id of every lease granted from now on."""
        self._listeners.append(listener)

    async def lease(self) -> int:
        """The current lease's id. Waits for one without a deadline of its own."""
        while self._lease is None:
            await self._granted.wait()
        return self._lease

    def report_lost(self, lease: int) -> None:
        """etcd refused `lease`: a new one is granted at once instead of at the next renewal."""
        if lease == self._lease:
            self._drop(lease, "refused by etcd")
            self._hurry.set()

    async def close(self, deadline: float = 2.0) -> None:
        """Stops renewing and revokes the lease, which deletes its keys. Takes `deadline` seconds at most."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait({task})
        lease, self._lease = self._lease, None
        self._granted.clear()
        if lease is None:
            return
        try:
            await self._client.revoke_lease(lease, deadline=deadline)
        except LeaseNotFoundError:
            pass
        except EtcdError as error:
            _log.warning("lease_not_revoked", lease=f"{lease:x}", expires_in=self._ttl, error=str(error))

    async def _run(self) -> None:
        backoff = Backoff(longest=self._ttl / 3)
        while True:
            try:
                await self._grant_or_renew()
            except LeaseNotFoundError as error:
                self._drop(self._lease, str(error))
                continue
            except EtcdError as error:
                self._trouble(error)
                wait = backoff.next()
            except Exception as error:  # noqa: BLE001 - a bug here must not end the lease without a word
                _log.exception("lease_keeper_bug")
                self._trouble(error)
                wait = backoff.next()
            else:
                self._recovered()
                backoff.reset()
                wait = self._ttl / 3
            await self._sleep(wait)

    async def _grant_or_renew(self) -> None:
        started = time.monotonic()
        deadline = max(self._ttl / 3, 1.0)
        if self._lease is not None:
            await self._client.renew_lease(self._lease, deadline=deadline)
        else:
            self._lease = await self._client.grant_lease(self._ttl, deadline=deadline)
            self._granted.set()
            _log.info("lease_granted", lease=f"{self._lease:x}", ttl=self._ttl)
            for listener in self._listeners:
                listener(self._lease)
        self._renewed_at = started

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            pass
        self._hurry.clear()

    def _drop(self, lease: int | None, why: str) -> None:
        if lease is None:
            return
        _log.warning("lease_lost", lease=f"{lease:x}", reason=why)
        self._lease = None
        self._granted.clear()

    def _trouble(self, error: Exception) -> None:
        if self._troubled_since is None:
            self._troubled_since = time.monotonic()
            _log.warning("lease_renewal_failing", error=str(error))

    def _recovered(self) -> None:
        if self._troubled_since is not None:
            _log.info("lease_renewal_regained", outage_s=round(time.monotonic() - self._troubled_since, 1))
            self._troubled_since = None
