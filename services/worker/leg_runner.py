"""Runs one leg from its request to its last token: checks, admission, engine, typed errors.

GenerateService (one stream per leg) and WorkerSessionService (one stream for all) are two ways to call it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator

from opentelemetry.trace import Span

from kvbaton.errors import RequestError, invalid
from kvbaton.v1 import generate_pb2
from services.modes import GENERATE
from services.requests import Role, check_logprobs, check_prompt, check_request_id, check_sampling, sent_tokens
from services.telemetry import tracing
from services.worker.core import Loaded, WorkerCore
from services.worker.engines.protocol import (
    EngineDeadError,
    EngineDelta,
    EngineFinish,
    EngineRefusedError,
    EngineRequest,
    Finish,
)
from services.worker.leg_errors import LegErrors
from services.worker.legs import Leg
from services.worker.load import LegLoad
from services.worker.role import RoleContract

_FINISH_REASONS = {
    Finish.STOP: generate_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
}


class LegRunner:
    """One per worker."""

    def __init__(self, core: WorkerCore, contract: RoleContract) -> None:
        self._core = core
        self._contract = contract
        self._errors = LegErrors(core)

    async def run(
        self,
        request: generate_pb2.GenerateRequest,
        trace_headers: dict[str, str],
        accepted: Callable[[], Awaitable[None]],
        load: LegLoad | None = None,
    ) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """What GenerateService streams. `accepted` is called once the engine has the leg. Raises RequestError.

        `load` is the leg's, where it counts already. Leaving it early aborts the leg.
        """
        received = time.monotonic()
        load = load or self._core.expect(request)
        with load, self._span(request, trace_headers) as span:
            self._core.require_rpc(GENERATE)
            request_id = check_request_id(request.request_id)
            loaded = self._core.require_accepting()
            engine_request = await self._checked(request, loaded, tracing.headers_of(span))
            legs = self._core.legs
            self._core.require_accepting()  # still, after the checks have waited

            def generate(leg: Leg) -> AsyncIterator[EngineDelta]:
                return load.follow(loaded.engine.generate(_with_engine_id(engine_request, leg)))

            leg = tracing.call_under(span, legs.admit, request_id, generate)
            timings = _Timings(received, self._core.role)
            try:
                await accepted()
                span.add_event("accepted")
                async for delta in leg.deltas():
                    if timings.token(delta):
                        span.add_event("first token")
                    if delta.finish is not None:
                        _describe_end(span, delta.finish)
                        if delta.finish.reason is Finish.ABORT:
                            raise self._errors.aborted(leg, delta.finish)
                    yield self._response(delta, leg, timings)
            except (EngineRefusedError, EngineDeadError, RequestError) as error:
                # The servicer knows the leg, its room and its id; the error itself may not.
                typed = self._errors.typed(error)
                raise typed.with_context(room=request.bootstrap.room, request_id=leg.request_id) from error
            finally:
                await legs.leave(leg)

    @contextlib.contextmanager
    def _span(self, request: generate_pb2.GenerateRequest, trace_headers: dict[str, str]) -> Generator[Span]:
        """The leg's span, which isn't made current: a generator has no context of its own between two yields."""
        span = tracing.server_span("kvbaton.leg", trace_headers)
        if span.is_recording():
            span.set_attribute("kvbaton.role", self._core.role)
            span.set_attribute("kvbaton.worker", self._core.instance_id)
            span.set_attribute("kvbaton.request_id", request.request_id)
            span.set_attribute("kvbaton.room", f"{request.bootstrap.room:#x}")
        error: RequestError | None = None
        try:
            yield span
        except BaseException as raised:
            error = tracing.as_request_error(raised)
            raise
        finally:
            tracing.set_outcome(span, error)
            span.end()

    async def _checked(
        self, request: generate_pb2.GenerateRequest, loaded: Loaded, trace_headers: dict[str, str]
    ) -> EngineRequest:
        """The request as the engine takes it, or an error that names the field."""
        loaded.require_model(request.model)
        given = request.WhichOneof("input")
        if given != "token_ids":
            raise invalid(given or "token_ids", "a worker takes token_ids only; text and chat are the frontend's")
        if request.sampling.stop:
            raise invalid("sampling.stop", "stop strings are matched by the frontend; a worker takes stop_token_ids")
        if request.sampling.HasField("skip_special_tokens"):
            raise invalid("sampling.skip_special_tokens", "a worker returns no text")
        if request.HasField("priority"):
            raise invalid("priority", "requests wait for their turn in the frontend, not here")
        if request.HasField("n"):
            raise invalid("n", "a worker gives one answer; the frontend makes several requests of one")
        if request.HasField("allow_inexact_migration"):
            raise invalid("allow_inexact_migration", "a worker's request goes nowhere else; the frontend's may")
        for hint in ("prefill_worker", "decode_worker"):
            if getattr(request, hint):
                raise invalid(hint, "the frontend chooses workers; this is one already")
        token_ids = check_prompt(sent_tokens(request.token_ids), loaded.limits)
        sampling = check_sampling(request.sampling, prompt_tokens=len(token_ids), limits=loaded.limits)
        dp_rank = request.dp_rank if request.HasField("dp_rank") else None
        if dp_rank is not None and dp_rank >= loaded.info.dp_size:
            raise invalid("dp_rank", f"{dp_rank}: this worker has {loaded.info.dp_size} data-parallel ranks")
        room = await self._contract.room(request)
        return EngineRequest("", token_ids, sampling, room, dp_rank, trace_headers, check_logprobs(request))

    def _response(self, delta: EngineDelta, leg: Leg, timings: _Timings) -> generate_pb2.GenerateResponse:
        logprobs = [each.to_proto() for each in delta.logprobs]
        response = generate_pb2.GenerateResponse(token_ids=delta.token_ids, logprobs=logprobs)
        if delta.finish is None:
            return response
        finished = response.finished
        finished.reason = _FINISH_REASONS[delta.finish.reason]
        if delta.finish.matched_token_id is not None:
            finished.matched_token_id = delta.finish.matched_token_id
        finished.usage.prompt_tokens = delta.finish.prompt_tokens
        finished.usage.completion_tokens = delta.finish.completion_tokens
        finished.usage.cached_prompt_tokens = delta.finish.cached_tokens
        finished.request_id = leg.request_id
        timings.write(finished.timings)
        return response


class _Timings:
    """When the phases of one leg ended, on the monotonic clock."""

    def __init__(self, received: float, role: Role) -> None:
        self._received = received
        self._role = role
        self._submitted = time.monotonic()
        self._first: float | None = None

    def token(self, delta: EngineDelta) -> bool:
        """Whether it has the first token."""
        if self._first is not None or not delta.token_ids:
            return False
        self._first = time.monotonic()
        return True

    def write(self, timings: generate_pb2.Timings) -> None:
        now = time.monotonic()
        timings.queue.FromNanoseconds(int((self._submitted - self._received) * 1e9))
        if self._first is None:
            return
        # Until its first token a decode worker can't tell prefill from transfer; a prefill worker sees no decode.
        if self._role is not Role.DECODE:
            timings.prefill.FromNanoseconds(int((self._first - self._submitted) * 1e9))
        if self._role is not Role.PREFILL:
            timings.decode.FromNanoseconds(int((now - self._first) * 1e9))


def _describe_end(span: Span, finish: EngineFinish) -> None:
    if span.is_recording():
        span.set_attribute("gen_ai.response.finish_reasons", [finish.reason])
        span.set_attribute("gen_ai.usage.input_tokens", finish.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", finish.completion_tokens)


def _with_engine_id(request: EngineRequest, leg: Leg) -> EngineRequest:
    return dataclasses.replace(request, engine_id=leg.engine_id)
