"""What every data-parallel rank has: requests, a window, pages, a forward pass at a time, and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.worker.engines.protocol import EngineLoad, Finish
from services.worker.engines.simulated.faults import Faults, Phase
from services.worker.engines.simulated.options import SimulatedOptions
from services.worker.engines.simulated.pages import PageAllocator, PageArray
from services.worker.engines.simulated.request import Request

if TYPE_CHECKING:
    from hashlib import blake2b as Hash  # noqa: N812 - a class in the type stubs only

# Forward passes that one look at the clock makes up for; a host that was away longer has lost the rest.
_MAX_CATCH_UP = 64


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward pass: of some prompts' chunks (tokens each), or one decode step where `chunks` is empty."""

    ends_at: float
    requests: Sequence[Request]
    chunks: Sequence[int] = ()


@dataclass(slots=True)
class Counters:
    """Since the start."""

    requests: int = 0
    tokens: int = 0
    steps: int = 0
    most_running: int = 0


class Rank:
    """One dp rank; the roles fill in the rest. All of it runs in the scheduler's tick.

    `forget` tells the scheduler that a request has let go of everything; `post` brings an event into its next tick.
    """

    def __init__(
        self,
        index: int,
        options: SimulatedOptions,
        faults: Faults,
        forget: Callable[[Request], None],
        post: Callable[..., None],
    ) -> None:
        self.index = index
        self.options = options
        self.faults = faults
        self.array = PageArray(options.pages, options.page_size)
        self.allocator = PageAllocator(options.pages)
        self.counters = Counters()
        self.live: dict[str, Request] = {}
        self._holders: dict[Request, None] = {}
        self._forget = forget
        self._post = post
        self._held_pages = 0
        self._freed = False
        self._fresh: dict[Request, None] = {}
        self._forward: Forward | None = None

    def submit(self, request: Request) -> None:
        """Takes a request in."""
        self.live[request.engine_id] = request
        self.counters.requests += 1
        self.faults.hold.seen += request.prompt[0] == self.faults.hold.token
        self._enqueue(request)

    def abort(self, request: Request) -> None:
        """Ends a live request because its caller wants it."""
        if request.ended:
            return
        if self.faults.finish_after_abort:
            self._drop(request, "Aborted by AbortReq.")
            self._end(request, Finish.LENGTH)
        else:
            self._abort(request)

    def fail(self, request: Request, message: str, status: int = 500) -> None:
        """Ends a live request with an abort chunk."""
        self._drop(request, message)
        self._end(request, Finish.ABORT, message=message, status=status)

    def tick(self, now: float) -> float | None:
        """Everything that is due; returns when something is due again, None when only an event can change that."""
        faults = self.faults
        if faults.abort_chunk.count or faults.early_length.count:
            for request in list(self.live.values()):
                self._end_by_fault(request)
        self._freed = True
        while self._freed:  # what has ended makes room for what waits
            self._freed = False
            self._admit(now)
            self._advance(now)
        for request in self._fresh:
            if request.fresh:
                request.flush()
        self._fresh.clear()
        dues = [due for due in self._dues(now) if due is not None]
        if self._forward is not None:
            dues.append(self._forward.ends_at)
        return min(dues, default=None)

    def progress(self, now: float) -> None:
        """What was under way goes on, before any event is looked at."""

    def thaw(self, now: float) -> None:
        """The time of a freeze is not made up for."""
        if self._forward is not None and self._forward.ends_at < now:
            self._forward = Forward(now, self._forward.requests, self._forward.chunks)

    def load(self, at: float) -> EngineLoad:
        """`at` in Unix seconds."""
        waiting = len(self.live) - self.running
        total = self.allocator.total * self.options.page_size
        # Pages that requests share count for each of them.
        used = min(total, self._held_pages * self.options.page_size)
        return EngineLoad(self.index, self.running, waiting, used, total, at)

    def state(self) -> dict[str, int]:
        """For tests: what is held, and what has been."""
        return {
            "live": len(self.live),
            "running": self.running,
            "holding": self.holding,
            "marked": len(self._marked()),
            "held": sum(request.engine_id in self.faults.hold.held for request in self.live.values()),
            "free_pages": self.allocator.free,
            "evictable_pages": self.evictable,
            "held_back": self.held_back,
            "requests": self.counters.requests,
            "tokens": self.counters.tokens,
            "steps": self.counters.steps,
            "most_holding": self.counters.most_running,
        }

    @property
    def holding(self) -> int:
        """Requests with a slot and pages, those included whose pages wait for a writer."""
        return len(self._holders)

    @property
    def running(self) -> int:
        """Requests in the forward passes or their transfers."""
        return self.holding - self.held_back

    @property
    def held_back(self) -> int:
        """Ended requests whose pages wait for their writer."""
        return 0

    @property
    def evictable(self) -> int:
        """Pages that only a cache holds."""
        return 0

    def _hold(self, request: Request, pages: list[int]) -> None:
        request.pages = pages
        self._holders[request] = None
        self._held_pages += len(pages)
        self.counters.most_running = max(self.counters.most_running, self.holding)

    def _let_go(self, request: Request) -> None:
        """Gives slot and pages back; once is enough."""
        if request.table is not None:
            request.table.close()
            request.table = None
        if request.pages:
            self.allocator.release(request.pages)
            self._held_pages -= len(request.pages)
            request.pages = []
            del self._holders[request]
            self._freed = True

    def _stands_still(self, phase: Phase, request: Request) -> bool:
        return self.faults.hold.takes(phase, request.engine_id, request.prompt)

    def _marked(self) -> set[Request]:
        """What is live or holds pages, of the requests that a hold is for."""
        token = self.faults.hold.token
        return {request for request in (*self.live.values(), *self._holders) if request.prompt[0] == token}

    def _emit(self, request: Request, context: Hash) -> None:
        """One more output token, the one behind `context`, with everything that it may end."""
        token = request.rule.next_token(context, request.produced)
        if not request.produced and self.faults.wrong_first_tokens:
            self.faults.wrong_first_tokens -= 1
            token = (token + 1) % self.options.vocab_size
        if request.logprobs is not None:
            request.fresh_logprobs.append(request.rule.logprob(context, request.produced, token, request.logprobs))
        if request.table is not None:
            request.table.append(token)
        request.produced += 1
        request.fresh.append(token)
        self._fresh[request] = None
        self.counters.tokens += 1
        if self._end_by_fault(request):
            return
        finish = self._finish(request, token)
        if finish is not None:
            self._drop(request, "")
            self._end(request, finish, matched=token if finish is Finish.STOP else None)

    def _finish(self, request: Request, token: int) -> Finish | None:
        return request.rule.finish(token, request.produced)

    def _step(self, requests: Iterable[Request]) -> None:
        """One decode step: every token from the bytes that the request's pages hold now."""
        self.counters.steps += 1
        for request in requests:
            if not request.ended and request.table is not None:
                self._emit(request, request.table.context())

    def _end_by_fault(self, request: Request) -> bool:
        faults = self.faults
        if faults.abort_chunk.hits(request.produced):
            self.fail(request, faults.abort_chunk.message or "simulated abort", faults.abort_chunk.status)
            return True
        if faults.early_length.hits(request.produced):
            self._drop(request, "")
            self._end(request, Finish.LENGTH)
            return True
        return False

    def _end(
        self, request: Request, reason: Finish, *, message: str = "", status: int = 0, matched: int | None = None
    ) -> None:
        request.end(reason, message=message, status=status, matched=matched)
        self.live.pop(request.engine_id, None)
        self._forget(request)

    def _advance(self, now: float) -> None:
        start = now
        for _ in range(_MAX_CATCH_UP):
            if self._forward is None:
                self._forward = self._next_forward(start)
            if self._forward is None or self._forward.ends_at > now:
                return
            forward, self._forward = self._forward, None
            start = forward.ends_at
            self._complete(forward, start)
        self._forward = self._next_forward(now)

    def _enqueue(self, request: Request) -> None:
        raise NotImplementedError

    def _admit(self, now: float) -> None:
        """Events, time-outs, and requests from the queue."""
        raise NotImplementedError

    def _next_forward(self, start: float) -> Forward | None:
        raise NotImplementedError

    def _complete(self, forward: Forward, now: float) -> None:
        raise NotImplementedError

    def _abort(self, request: Request) -> None:
        """An abort by the caller, in the words of the role."""
        self._drop(request, "Aborted by AbortReq.")
        self._end(request, Finish.ABORT, message="Aborted")

    def _drop(self, request: Request, reason: str) -> None:
        """Takes a request out of every queue and lets its pages go. `reason` is empty for a good end."""
        raise NotImplementedError

    def _dues(self, now: float) -> Iterable[float | None]:
        """When something other than the forward pass is due."""
        raise NotImplementedError
