"""One request: its call, its planned cancellation, the times of its messages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import grpc
import grpc.aio

from kvbaton.client import bearer
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.tools.bench.options import Range
from services.tools.bench.samples import INTERRUPTED, Kind, Outcome, Sample
from services.tools.bench.workload import Planned

_FIRST_GUESS = 1.0


class CancelTimes:
    """When planned cancellations happen: in a fixed window, or over the mean duration of the answers so far."""

    def __init__(self, window: Range[float] | None) -> None:
        self._window = window
        self._sum = 0.0
        self._count = 0

    def saw(self, seconds: float) -> None:
        """An answer took so long."""
        self._sum += seconds
        self._count += 1

    def after(self, share: float) -> float:
        """Seconds after sending, for a share of the window in [0, 1)."""
        if self._window is not None:
            return self._window.low + share * (self._window.high - self._window.low)
        return share * (self._sum / self._count if self._count else _FIRST_GUESS)


class Sender:
    """Sends requests over several channels in turn. `timeout` in seconds."""

    def __init__(
        self, channels: Sequence[grpc.aio.Channel], timeout: float, cancel_times: CancelTimes, api_key: str = ""
    ) -> None:
        self._metadata = bearer(api_key)
        self._stubs = [generate_pb2_grpc.GenerateServiceStub(channel) for channel in channels]
        self._timeout = timeout
        self._cancel_times = cancel_times

    async def send(self, planned: Planned, start: float | None = None) -> Sample:
        """Runs the request to its end. `start` is when it was due; now, if None.

        A cancelled task returns the sample, too (Kind.INTERRUPTED): the caller keeps it and then ends.
        """
        stub = self._stubs[planned.index % len(self._stubs)]
        sent = perf_counter()
        sample = Sample(planned.index, sent if start is None else start, sent)
        # The stubs declare the synchronous call type.
        call: Any = stub.Generate(planned.message, timeout=self._timeout, metadata=self._metadata)
        timer = None
        if planned.cancel_at is not None:
            sample.cancel_planned = True
            timer = asyncio.get_running_loop().call_later(self._cancel_times.after(planned.cancel_at), call.cancel)
        try:
            sample.outcome = _answered(sample, await _receive(call, sample))
        except asyncio.CancelledError:
            call.cancel()
            task = asyncio.current_task()
            stopped = task is not None and task.cancelling()
            sample.outcome = INTERRUPTED if stopped else Outcome(Kind.CANCELLED)
        except grpc.aio.AioRpcError as status:
            error = RequestError.from_rpc_error(status)
            sample.outcome, sample.detail = Outcome(Kind.ERROR, error.code.name, error.reason.value), error.message
        finally:
            if timer is not None:
                timer.cancel()
        sample.ended = perf_counter()
        if sample.outcome.kind is Kind.FINISHED:
            self._cancel_times.saw(sample.ended - sent)
        return sample


async def _receive(call: Any, sample: Sample) -> generate_pb2.Finished | None:
    times, tokens = sample.times, sample.tokens
    finished = None
    message: generate_pb2.GenerateResponse
    async for message in call:
        if count := len(message.token_ids):
            times.append(perf_counter())
            tokens.append(count)
        if message.HasField("finished"):
            finished = message.finished
    return finished


def _answered(sample: Sample, finished: generate_pb2.Finished | None) -> Outcome:
    """A stream that ended with OK."""
    if finished is None:
        sample.detail = "the stream ended with OK but without `finished`"
        return Outcome(Kind.ERROR, grpc.StatusCode.OK.name, "NOT_FINISHED")
    sample.prompt_tokens = finished.usage.prompt_tokens
    sample.cached_tokens = finished.usage.cached_prompt_tokens
    name = generate_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    return Outcome(Kind.FINISHED, reason=name)
