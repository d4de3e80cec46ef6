"""How an answer goes on elsewhere behind its first token: where that is exact, and what the next pair is sent.

The next pair computes the prompt and all tokens so far as its prompt. Greedy tokens follow from those alone; a seed's
noise is a function of the seed and the token's position, which are what they were. Penalties count output tokens, of
which the next engine knows none, and a grammar would begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, worker_pb2
from services.frontend.link.protocol import LegFinished
from services.frontend.request.prepare import PreparedRequest
from services.frontend.router.placement import Incarnation, Placement, incarnation_of
from services.frontend.router.worker import Worker
from services.requests import Sampling
from services.telemetry import metrics


class Migration:
    """One answer's moves to other workers, `limit` of them at most. 0: none, and errors are the workers' own."""

    def __init__(self, prepared: PreparedRequest, limit: int) -> None:
        self._prepared = prepared
        self._limit = self._left = limit
        # Until the answer goes on.
        self._cause: RequestError | None = None
        # What the tokens so far are from.
        self._weights: tuple[str, str] | None = None

    def begin(self, error: RequestError, placement: Placement, taken: Sequence[int]) -> PreparedRequest:
        """What the next attempt runs, `taken` being all tokens so far, the last of them from `placement`.

        Raises the error itself where the limit is reached, and NOT_MIGRATABLE where the answer can't go on exactly.
        """
        self.failed()
        if not self._limit:
            raise error
        if not self._left:
            self._count("limit")
            raise error
        if why := what_keeps(self._prepared):
            self._count("inexact")
            raise _not_migratable(error, why, len(taken))
        self._left -= 1
        self._cause, self._weights = error, _weights(placement.decode)
        return replay(self._prepared, taken)

    @property
    def cause(self) -> RequestError:
        """What the move that is under way is because of."""
        assert self._cause is not None
        return self._cause

    def unfit(self, placement: Placement, rest: PreparedRequest) -> frozenset[Incarnation]:
        """Workers that can't take over: they don't take such a request, or their weights are others."""
        if self._cause is None:
            return frozenset()
        return frozenset(
            incarnation_of(worker)
            for worker in placement.workers
            if not _takes(worker.record.runtime, rest) or _weights(worker) != self._weights
        )

    def continued(self) -> None:
        """Tokens come, or the end."""
        if self._cause is not None:
            self._cause = None
            self._count("continued")

    def failed(self) -> None:
        """The request ends, or needs a further move. Without effect on a move that has succeeded."""
        if self._cause is not None:
            self._cause = None
            self._count("failed")

    def _count(self, outcome: str) -> None:
        metrics.MIGRATIONS.labels(self._prepared.model, outcome).inc()


def what_keeps(prepared: PreparedRequest) -> str:
    """The field because of which the answer may not go on elsewhere; empty when it may."""
    sampling = prepared.sampling
    if sampling.grammar is not None:
        return prepared.grammar_field or sampling.grammar.field
    return "" if prepared.inexact_migration else _what_is_inexact(sampling)


def replay(prepared: PreparedRequest, taken: Sequence[int]) -> PreparedRequest:
    """The rest of the answer as a request of its own; `taken` is shorter than the whole."""
    count, sampling = len(taken), prepared.sampling
    rest = replace(
        sampling,
        max_new_tokens=sampling.max_new_tokens - count,
        min_new_tokens=max(0, sampling.min_new_tokens - count),
    )
    return replace(prepared, token_ids=[*prepared.token_ids, *taken], sampling=rest)


def lost_end(prepared: PreparedRequest, taken: Sequence[int]) -> LegFinished | None:
    """The end of an answer whose tokens are all there, but for the worker's word that they are."""
    sampling = prepared.sampling
    finished = generate_pb2.Finished()
    if not taken:
        return None
    if taken[-1] in prepared.ends and len(taken) >= sampling.min_new_tokens:
        finished.reason, finished.matched_token_id = generate_pb2.FINISH_REASON_STOP, taken[-1]
    elif len(taken) >= sampling.max_new_tokens:
        finished.reason = generate_pb2.FINISH_REASON_LENGTH
    else:
        return None
    return LegFinished([], finished)


def _takes(runtime: worker_pb2.RuntimeConfig, rest: PreparedRequest) -> bool:
    """Workers of one model may differ in what they take, and its first ones took the request."""
    prompt, sampling = len(rest.token_ids), rest.sampling
    return (
        prompt <= runtime.max_prompt_tokens
        and prompt + sampling.max_new_tokens <= runtime.context_length
        and (sampling.seed is None or runtime.seeded_sampling)
        and (not rest.cache_salt or runtime.cache_salts)
    )


def _weights(worker: Worker) -> tuple[str, str]:
    """What its numbers come from. While a model is replaced there are two of one name."""
    return worker.record.model.revision, worker.record.runtime.kv_cache_dtype


def _what_is_inexact(sampling: Sampling) -> str:
    for name, neutral in (("frequency_penalty", 0.0), ("presence_penalty", 0.0), ("repetition_penalty", 1.0)):
        if getattr(sampling, name) != neutral:
            return f"sampling.{name}"
    greedy = sampling.temperature == 0.0 or sampling.top_k == 1
    return "" if greedy or sampling.seed is not None else "sampling.temperature without sampling.seed"


def _not_migratable(error: RequestError, why: str, tokens: int) -> RequestError:
    return RequestError(
        grpc.StatusCode.ABORTED,
        Reason.NOT_MIGRATABLE,
        f"after {tokens} tokens {error.leg or 'a worker'} failed ({error}),"
        f" and the answer can't go on elsewhere as it would have: {why}",
        leg=error.leg,
        worker=error.worker,
        room=error.room,
        retry_after=error.retry_after,
    )
