"""One request as its client sees it, whatever the number of its choices: each has an owner, all share one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from kvbaton.errors import RequestError, cancelled
from services.frontend.request.api import Output
from services.frontend.request.outbox import Outbox
from services.frontend.request.owner import RequestOwner
from services.frontend.request.report import Report
from services.frontend.router.placement import Target


class FanOut:
    """Implements `LiveRequest`. `start` it once; `choice_gone` is called for each choice, `ended` behind the last one.

    The first choice that fails ends the others with its error.
    """

    def __init__(
        self,
        request_id: str,
        outbox: Outbox,
        *,
        prompt_tokens: int,
        choice_gone: Callable[[], None],
        ended: Callable[[FanOut], None],
    ) -> None:
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._outbox = outbox
        self._choice_gone = choice_gone
        self._ended = ended
        self.owners: Sequence[RequestOwner] = ()
        """In the order of their choices; none once the request has ended."""
        self.error: RequestError | None = None
        # Not started: they wait for the first one's prefill.
        self._held: Sequence[RequestOwner] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._choices = self._choices_left = 0

    @property
    def request_id(self) -> str:
        """See `LiveRequest`."""
        return self._request_id

    @property
    def prompt_tokens(self) -> int:
        """See `LiveRequest`."""
        return self._prompt_tokens

    def start(self, owners: Sequence[RequestOwner], *, first_alone: bool) -> None:
        """Begins; with `first_alone` the other choices follow when the first one's prompt has been computed."""
        self.owners = owners
        self._choices = self._choices_left = len(owners)
        self._held = owners[1:]
        self._run(owners[0])
        if not first_alone:
            self._release(prefers="")

    async def outputs(self) -> AsyncIterator[Output]:
        """See `LiveRequest`."""
        unfinished = self._choices
        try:
            while unfinished:
                output = await self._outbox.get()
                yield output
                unfinished -= output.finished is not None
        finally:
            self._outbox.close()
            self.cancel()

    def when_cut_off(self, act: Callable[[], None]) -> None:
        """See `LiveRequest`."""
        self._outbox.when_cut_off(act)

    def cancel(self) -> None:
        """See `LiveRequest`."""
        self.end(cancelled())

    def end(self, error: RequestError) -> None:
        """Ends every leg of every choice; `outputs` then raises the error. Without effect on what has ended."""
        # Also those that are held: their turn may come before the first one hears of this.
        for owner in self.owners:
            owner.end(error)

    def choice_prefilled(self) -> None:
        """See `Progress`: whoever waits for the first choice finds the prompt in its prefill worker's cache."""
        if self._held:
            self._release(prefers=self.owners[0].prefill_worker)

    def choice_failed(self, error: RequestError) -> None:
        """See `Progress`."""
        if self.error is not None:
            return
        self.error = error
        self._outbox.fail(error)
        self.end(error)
        held, self._held = self._held, ()
        for owner in held:
            owner.leave()
            self.choice_ended()

    def choice_ended(self) -> None:
        """See `Progress`."""
        self._choices_left -= 1
        self._choice_gone()
        if not self._choices_left:
            self._ended(self)
            # They know this object: without the circle a request's memory is free when it ends.
            self.owners = ()

    def report(self, model: str, received: float) -> Report:
        """Of the whole, before `ended` returns; `received` is on the monotonic clock."""
        failed = [owner for owner in self.owners if self.error is not None and owner.answer.error is self.error]
        return Report(
            request_id=self.request_id,
            model=model,
            error=self.error,
            answers=[owner.answer for owner in self.owners],
            attempts=sum(owner.attempts for owner in self.owners),
            ended_in=(*failed, *self.owners)[0].ended_in,
            duration=time.monotonic() - received,
        )

    def _release(self, *, prefers: str) -> None:
        held, self._held = self._held, ()
        for owner in held:
            owner.release(prefers=prefers)
            self._run(owner)

    def _run(self, owner: RequestOwner) -> None:
        task = owner.start()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def first_alone(targets: Sequence[Target], *, prompt_tokens: int, choices: int) -> bool:
    """Whether one choice should compute the prompt for all, because computing it for each would take longer.

    Prompts that fit into one prefill batch together take one pass, and waiting for the first would be a second one.
    More than that are as many passes, while a prompt that the first choice has left in the prefix cache costs its last
    page. Only if the others can be sent where the first one went: to a prefill worker, or to the only aggregated one.
    """
    if choices == 1 or not targets or (len(targets) > 1 and any(target.aggregated for target in targets)):
        return False
    computing = [worker for target in targets for worker in (target.prefills or (target.decode,))]
    runtimes = [worker.record.runtime for worker in computing]
    one_batch = min(runtime.max_batched_tokens for runtime in runtimes)
    return prompt_tokens > max(runtime.page_size for runtime in runtimes) and choices * prompt_tokens > one_batch
