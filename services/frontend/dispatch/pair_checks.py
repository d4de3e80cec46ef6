"""Whether a prefill and a decode worker can hand over a KV cache: proven once for each pair of incarnations.

Lazily, when a request first meets the pair: decode looks its peer up and asks its bootstrap server (CheckPeer), then
one page really goes from one to the other. That also opens the connection between them, so that no request pays for
it. A pair that fails is left alone for a while; meanwhile requests go to others, or wait.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog

from kvbaton.errors import Reason, RequestError
from services.frontend.link.protocol import LegAccepted, LegEvent, LegFailed, LegFinished
from services.frontend.request.attempt import Attempt
from services.frontend.request.prepare import PreparedRequest
from services.frontend.router.placement import Placement
from services.frontend.router.worker import Worker
from services.requests import Role, Sampling
from services.telemetry import tracing

log = structlog.get_logger()

# Seconds for both steps together: a first connection between two NIXL agents can take some.
CHECK_TIMEOUT = 15.0
# Seconds until a failed pair is tried again; doubled after each failure.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0


class PairState(StrEnum):
    """What is known of a pair."""

    UNKNOWN = "unknown"
    CHECKING = "checking"
    PROVEN = "proven"
    FAILED = "failed"
    """Tried again after a pause."""
    REFUSED = "refused"
    """Decode says that the two can never pair."""


@dataclass
class _Pair:
    state: PairState = PairState.UNKNOWN
    failures: int = 0
    again: asyncio.TimerHandle | None = None


class PairChecks:
    """Belongs to the event loop. `enabled=False`: every pair counts as proven."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        # By incarnation, prefill's and decode's.
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._changed: Callable[[Worker], None] = lambda decode: None
        self._tasks: set[asyncio.Task[None]] = set()

    def on_change(self, listener: Callable[[Worker], None]) -> None:
        """Called with the decode worker of a pair whose state has changed by a proof, or by time."""
        self._changed = listener

    def state(self, prefill: Worker, decode: Worker) -> PairState:
        """What is known of the two."""
        if not self._enabled:
            return PairState.PROVEN
        pair = self._pairs.get(_key(prefill, decode))
        return PairState.UNKNOWN if pair is None else pair.state

    def begin(self, placement: Placement) -> None:
        """Starts the proof of an unknown pair; it spends the placement's credit."""
        assert placement.prefill is not None
        pair = self._pairs.setdefault(_key(placement.prefill, placement.decode), _Pair())
        pair.state = PairState.CHECKING
        names = f"{placement.prefill.instance_id} {placement.decode.instance_id}"
        task = asyncio.create_task(self._check(pair, placement), name=f"pair check {names}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def keep_only(self, incarnations: set[str]) -> None:
        """Forgets pairs of incarnations that are gone."""
        for key in [key for key in self._pairs if not incarnations.issuperset(key)]:
            if (again := self._pairs.pop(key).again) is not None:
                again.cancel()

    def doubt(self, incarnations: set[str]) -> None:
        """Pairs of theirs that have been proven must be proven again."""
        for key, pair in self._pairs.items():
            if pair.state is PairState.PROVEN and not incarnations.isdisjoint(key):
                pair.state = PairState.UNKNOWN

    async def close(self) -> None:
        """Ends what runs."""
        self.keep_only(set())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _check(self, pair: _Pair, placement: Placement) -> None:
        prefill, decode = placement.prefill, placement.decode
        assert prefill is not None
        page = _Page(placement)
        try:
            async with asyncio.timeout(CHECK_TIMEOUT):
                await self._ask_decode(placement)
                await page.handed_over()
            self._set(pair, decode, PairState.PROVEN)
            log.info("pair proven", prefill=prefill.instance_id, decode=decode.instance_id)
        except (RequestError, TimeoutError) as error:
            why = str(error) or f"nothing came within {CHECK_TIMEOUT:g} s"
            log.warning("pair failed", prefill=prefill.instance_id, decode=decode.instance_id, why=why)
            refused = isinstance(error, RequestError) and error.reason is Reason.PEER_INCOMPATIBLE
            self._failed(pair, decode, refused=refused)
        finally:
            await page.close()

    async def _ask_decode(self, placement: Placement) -> None:
        assert placement.prefill is not None
        try:
            await placement.decode.check_peer(placement.prefill.record)
        except RequestError as error:
            # Losing etcd stops nothing: decode knows by itself whom it lets a request point it at.
            if error.reason is not Reason.REGISTRY_UNAVAILABLE:
                raise

    def _failed(self, pair: _Pair, decode: Worker, *, refused: bool) -> None:
        pair.failures += 1
        self._set(pair, decode, PairState.REFUSED if refused else PairState.FAILED)
        if not refused:
            pause = min(_FIRST_PAUSE * 2 ** (pair.failures - 1), _LONGEST_PAUSE)
            pair.again = asyncio.get_running_loop().call_later(pause, self._set, pair, decode, PairState.UNKNOWN)

    def _set(self, pair: _Pair, decode: Worker, state: PairState) -> None:
        pair.state = state
        self._changed(decode)


class _Page:
    """A request of one page through the pair."""

    def __init__(self, placement: Placement) -> None:
        assert placement.prefill is not None
        self._placement = placement
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._decoded = False
        tokens = placement.prefill.record.runtime.page_size
        prepared = PreparedRequest(
            request_id=f"pair-check-{uuid.uuid4().hex}",
            model=placement.decode.record.model.name,
            token_ids=[1] * max(1, min(tokens, placement.prefill.limits.max_prompt_tokens)),
            sampling=Sampling(max_new_tokens=2, temperature=0.0, ignore_eos=True),
            text=None,
        )
        self._attempt = Attempt(prepared, placement, self._hear, tracing.UNSAMPLED, proof=True)
        self._dispatched = False

    async def handed_over(self) -> None:
        """Returns when decode has answered from the page that prefill wrote. Raises RequestError."""
        self._dispatched = True
        self._attempt.dispatch()
        await self._ended

    async def close(self) -> None:
        """Leaves nothing on either worker."""
        if self._dispatched:
            await self._attempt.close(answered=self._decoded)
        elif self._placement.credit is not None:
            self._placement.decode.link.give_back(self._placement.credit)

    def _hear(self, attempt: Attempt, role: Role, event: LegEvent) -> None:
        if self._ended.done():
            return
        if isinstance(event, LegFailed):
            self._ended.set_exception(event.error)
            return
        try:
            if not isinstance(event, LegAccepted):
                attempt.hand_over.take(role, event)
        except RequestError as error:
            self._ended.set_exception(error)
            return
        self._decoded = self._decoded or (role is Role.DECODE and isinstance(event, LegFinished))
        if self._decoded and attempt.hand_over.settled:
            self._ended.set_result(None)


def _key(prefill: Worker, decode: Worker) -> tuple[str, str]:
    return (prefill.record.incarnation.uuid, decode.record.incarnation.uuid)
