"""Which workers a request's attempts get: its place in the queue, and its further ones after failed attempts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import grpc

from kvbaton.errors import RequestError
from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.request.attempt import Attempt
from services.frontend.request.events import FromQueue, Inbox
from services.frontend.request.migration import Migration
from services.frontend.request.prepare import PreparedRequest
from services.frontend.request.retry import RetryPolicy, leaves
from services.frontend.router.placement import Placement
from services.frontend.router.policies.policy import Prompt

# None of the workers that it may have is there, or the one that it names.
_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)


class Places:
    """Of one choice of a request, with `ticket` as its first place; each is for what is left of the answer then."""

    def __init__(
        self,
        prepared: PreparedRequest,
        queue: DispatchQueue,
        ticket: Ticket,
        inbox: Inbox,
        *,
        retries: int,
        migrations: int,
    ) -> None:
        """Further attempts number at most `retries` before the first token and `migrations` behind it."""
        self.rest = prepared
        """What the next attempt runs: behind the first token only the rest."""
        self.migration = Migration(prepared, migrations)
        self._queue = queue
        self._ticket = ticket
        self._inbox = inbox
        self._retry = RetryPolicy(retries)
        # The last attempt's; None before the first.
        self._failure: RequestError | None = None

    def leave(self) -> None:
        """Gives up the place, or the workers that were not used."""
        self._ticket.leave()

    def release(self, *, prefers: str) -> None:
        """A held ticket gets its turn, on that prefill worker if it can."""
        self._queue.release(self._ticket, prefers=prefers)

    def spend(self) -> None:
        """The attempt on the workers begins."""
        self._ticket.spend()

    async def workers(self) -> Placement:
        """Waits for workers that can run what is left. Raises RequestError, and EndedError as all that waits does."""
        while True:
            try:
                placement = await self._turn(self._ticket)
            except RequestError as error:
                if self._failure is None or error.code not in _NOBODY:
                    raise
                # All that it was to have are gone, or didn't come; those that it was to do without may serve again.
                self._retry.forgive()
                self._ticket = self._next(self._failure)
                continue
            unfit = self.migration.unfit(placement, self.rest)
            if not unfit:
                return placement
            self._ticket.leave()
            self._retry.exclude(unfit)
            self._ticket = self._next(self.migration.cause)

    def enter_again(self, error: RequestError, attempt: Attempt, taken: Sequence[int]) -> None:
        """A place for the next attempt, after `attempt` has failed and left the client with the tokens `taken`.

        Raises the error, or NOT_MIGRATABLE, where there is to be none.
        """
        if taken:
            self.rest = self.migration.begin(error, attempt.placement, taken)
        else:
            self._retry.spend(error)
        self._failure = error
        self._retry.failed(attempt.verdict(error))
        self._ticket = self._next(error, patient=leaves(error))

    async def pause(self) -> None:
        """A moment before the next attempt. Raises EndedError."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry.pause()):
                while True:
                    await self._inbox.get()

    async def _turn(self, ticket: Ticket) -> Placement:
        ticket.describe(self._prompt())
        ticket.deliver_to(lambda result: self._inbox.put(FromQueue(ticket, result)))
        while True:
            item = await self._inbox.get_in_time()
            if isinstance(item, FromQueue) and item.ticket is ticket:
                if isinstance(item.result, RequestError):
                    raise item.result
                return item.result

    def _next(self, error: RequestError, *, patient: bool = False) -> Ticket:
        choices = [(excluded, False) for excluded in self._retry.exclusions()]
        if patient:
            choices.append((self._retry.avoided(), True))
        prompt = self._prompt()
        for excluded, waits in choices:
            if (again := self._queue.enter_again(self._ticket, excluded, prompt, patient=waits)) is not None:
                return again
        raise error  # nobody is left to try: what failed is the better answer

    def _prompt(self) -> Prompt:
        return Prompt(self.rest.token_ids, cache_salt=self.rest.cache_salt)
