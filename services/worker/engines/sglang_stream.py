"""One request inside SGLang: what it is sent as, its chunks as deltas, and how it ends."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from services.requests import TopLogprob
from services.worker.engines.protocol import (
    EngineDelta,
    EngineFinish,
    EngineRefusedError,
    EngineRequest,
    Finish,
    Grammar,
    Sampling,
    TokenLogprob,
)
from services.worker.engines.sglang_grammar import TOO_SLOW

Chunk = Mapping[str, Any]

_SEED_RANGE = range(-(2**63), 2**63)
_BAD_REQUEST = 400
# What a token that can't come has for a logarithm, in 32 bits: an infinity that SGLang has made finite.
_IMPOSSIBLE = -1e30
# What SGLang's scheduler says of a grammar that it can't use, at the start and on the way.
_DEAD_END = "Grammar accept_token failed"
# All that 0.5.17 says of a grammar that ends a request on the way.
_ABORTED = "Aborted"
_LOST_TO_GRAMMAR = "no token of the vocabulary goes on from where the answer has come to, or it takes too long to tell"
_GRAMMAR_FAILURES = ("Failed to compile", "Grammar preprocessing timed out", _DEAD_END)


def check_request(request: EngineRequest, vocab_size: int, *, seeded: bool) -> None:
    """Raise EngineRefusedError for what SGLang doesn't check and what would end its scheduler process."""
    sampling = request.sampling
    check_tokens(request.token_ids, vocab_size)
    if any(not 0 <= token < vocab_size for token in sampling.stop_token_ids):
        raise EngineRefusedError(f"stop_token_ids are outside [0, {vocab_size})")
    if sampling.max_new_tokens < 1:
        raise EngineRefusedError("max_new_tokens must be at least 1")
    if sampling.seed is not None:
        if not seeded:
            raise EngineRefusedError("this engine takes no seed: start it with --enable-deterministic-inference")
        if sampling.seed not in _SEED_RANGE:
            raise EngineRefusedError("seed must fit into 64 bits with a sign")
    if any(not 0 <= token < vocab_size for token, _ in sampling.logit_bias):
        raise EngineRefusedError(f"logit_bias has token ids outside [0, {vocab_size})", field="sampling.logit_bias")


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """The same for a prompt, or a text to be embedded."""
    if not tokens:
        raise EngineRefusedError("the prompt is empty")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise EngineRefusedError(f"the prompt has token ids outside [0, {vocab_size})")


def sampling_params(sampling: Sampling, *, seeded: bool) -> dict[str, Any]:
    """SGLang's sampling parameters, complete: what is left out takes SGLang's defaults, not the model's or ours.

    An engine that samples from seeds gets one with every request: SGLang gives all others the same.
    """
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": _min_new_tokens(sampling),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    if sampling.logit_bias:
        params["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.grammar is not None:
        params[sampling.grammar.kind.value] = sampling.grammar.source  # SGLang's names are the wire's
    if seeded:
        params["sampling_seed"] = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return params


def _min_new_tokens(sampling: Sampling) -> int:
    """Where nothing can stop a request early it needs no minimum, whose mask costs a vocabulary of memory."""
    return 0 if sampling.ignore_eos and not sampling.stop_token_ids else sampling.min_new_tokens


def call_arguments(request: EngineRequest, *, seeded: bool, prefill_ranks: int = 0) -> dict[str, Any]:
    """Keyword arguments of `sglang.Engine.async_generate`. `prefill_ranks` is a prefill engine's dp size, else 0."""
    arguments: dict[str, Any] = {
        "input_ids": request.token_ids,
        "sampling_params": sampling_params(request.sampling, seeded=seeded),
        "stream": True,
        "rid": request.engine_id,
        "routed_dp_rank": request.dp_rank,
        "external_trace_header": dict(request.trace_headers) or None,
    }
    if request.logprobs is not None:
        arguments["return_logprob"] = True
        arguments["top_logprobs_num"] = request.logprobs
    if request.cache_salt:  # not every version knows the argument
        arguments["cache_salt"] = request.cache_salt
    if request.room is not None:
        arguments["bootstrap_host"] = request.room.host
        arguments["bootstrap_port"] = request.room.port
        arguments["bootstrap_room"] = request.room.room
        if prefill_ranks > 1:
            # What the room says anyway. Else SGLang compares the room with the rank within the attention's
            # group, which is 0 on every rank of plain data parallelism, and refuses all rooms but rank 0's.
            arguments["disagg_prefill_dp_rank"] = request.room.room % prefill_ranks
    return arguments


def _grammar_failure(message: str) -> str:
    """SGLang's words where they are the compiler's, and ours where they are about its own state."""
    if TOO_SLOW in message:
        return TOO_SLOW
    if message.startswith(_DEAD_END):
        return "no token of the vocabulary goes on from where the answer has come to"
    return message


def token_logprobs(meta: Mapping[str, Any]) -> list[TokenLogprob]:
    """Of the tokens of one chunk, in their order; without the likeliest ones where none were asked for.

    What can't come at all, for a grammar or a bias keeps it away, is none of the likeliest.
    """
    tokens: Sequence[Any] = meta.get("output_token_logprobs") or ()
    tops: Sequence[Any] = meta.get("output_top_logprobs") or [None] * len(tokens)
    return [
        TokenLogprob(
            int(token_id),
            float(logprob),
            tuple(TopLogprob(int(other), float(value)) for value, other, _ in top or () if value > _IMPOSSIBLE),
        )
        for (logprob, token_id, _), top in zip(tokens, tops, strict=True)
    ]


class LiveRequest:
    """A request from its submission to its end: fed by a pump task, read by one iterator.

    The pump goes on when the iterator is dropped, because ending SGLang's generator early aborts the request, and
    whether a request may be aborted is the caller's decision.
    """

    def __init__(
        self, engine_id: str, prompt_tokens: int, *, logprobs: bool = False, grammar: Grammar | None = None
    ) -> None:
        """`logprobs`: each token comes with its own. `grammar` is what a refusal by the scheduler may be about."""
        self.engine_id = engine_id
        self.aborting = False
        self.opened = False
        """Whether SGLang may know of it."""
        self.done = False
        self.embedding: Sequence[float] = ()
        """Of an embedding request that has ended well."""
        self._prompt_tokens = prompt_tokens
        self._logprobs = logprobs
        self._grammar = grammar
        self._delivered = 0
        self._output: asyncio.Queue[EngineDelta | Exception] = asyncio.Queue()

    async def pump(self, open_stream: Callable[[], Awaitable[AsyncIterator[Chunk]]]) -> None:
        """Read SGLang's stream to its end. Never raises: what goes wrong is put before the iterator.

        May be cancelled while the stream is not open: SGLang has heard of nothing then.
        """
        try:
            stream = await open_stream()
            self.opened = True
            async for chunk in stream:
                self._take(chunk)
            self.end_aborted("the engine's stream ended without a reason")
        except ValueError as error:
            if self.aborting:
                self.end_aborted(str(error))  # 0.5.17 ends a call this way when it is aborted early
            else:
                self.fail(EngineRefusedError(str(error)))
        except Exception as error:  # noqa: BLE001 - the iterator raises it
            self.fail(error)

    def end_aborted(self, message: str) -> None:
        """End as aborted, unless it has ended."""
        finish = EngineFinish(
            Finish.ABORT,
            message=message,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._delivered,
        )
        self._put(EngineDelta([], finish))

    def fail(self, error: Exception) -> None:
        """End with an exception, unless it has ended."""
        self._put(error)

    async def deltas(self) -> AsyncIterator[EngineDelta]:
        """The request's deltas; ends after the one with `finish`, or raises what it failed with."""
        while True:
            item = await self._output.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish is not None:
                return

    def _take(self, chunk: Chunk) -> None:
        if self.done:
            return
        meta: Mapping[str, Any] = chunk["meta_info"]
        tokens: Sequence[int] = chunk.get("output_ids") or ()
        reason: Mapping[str, Any] | None = meta.get("finish_reason")
        aborted = reason is not None and reason["type"] == "abort"
        if aborted:
            # SGLang repeats the last token in the chunk of some aborts.
            tokens = tokens[: max(0, int(meta.get("completion_tokens", 0)) - self._delivered)]
        logprobs: Sequence[TokenLogprob] = ()
        if self._logprobs:
            logprobs = token_logprobs(meta)
            if aborted:  # its last tokens may have none
                tokens = tokens[: len(logprobs)]
                logprobs = logprobs[: len(tokens)]
            elif [each.token_id for each in logprobs] != list(tokens):
                raise RuntimeError(f"SGLang gave {len(tokens)} tokens the log probabilities of others")
        if reason is None:
            if tokens:
                self._delivered += len(tokens)
                self._put(EngineDelta(list(tokens), None, logprobs))
            return
        if aborted and (refusal := self._refusal(reason, anything=bool(self._delivered or tokens))) is not None:
            self.fail(refusal)
            return
        self._delivered += len(tokens)
        self.embedding = chunk.get("embedding") or ()
        self._put(EngineDelta(list(tokens), self._finish(reason, meta), logprobs))

    def _refusal(self, reason: Mapping[str, Any], *, anything: bool) -> EngineRefusedError | None:
        """What of an abort is the request's own fault. `anything`: whether tokens have come."""
        message = str(reason.get("message") or "refused by the scheduler")
        if self._grammar is not None and message.startswith(_GRAMMAR_FAILURES):
            return EngineRefusedError(_grammar_failure(message), field=self._grammar.field)
        if self._grammar is not None and not self.aborting and message == _ABORTED and not reason.get("status_code"):
            return EngineRefusedError(_LOST_TO_GRAMMAR, field=self._grammar.field)
        if reason.get("status_code") == _BAD_REQUEST and not anything:
            return EngineRefusedError(message)
        return None

    def _finish(self, reason: Mapping[str, Any], meta: Mapping[str, Any]) -> EngineFinish:
        kind = Finish(reason["type"])
        matched = reason.get("matched")
        return EngineFinish(
            kind,
            matched_token_id=matched if isinstance(matched, int) else None,
            message=str(reason.get("message") or "") if kind is Finish.ABORT else "",
            status=int(reason.get("status_code") or 0),
            prompt_tokens=int(meta.get("prompt_tokens") or self._prompt_tokens),
            cached_tokens=int(meta.get("cached_tokens") or 0),
            completion_tokens=self._delivered,
        )

    def _put(self, item: EngineDelta | Exception) -> None:
        if self.done:
            return
        self.done = isinstance(item, Exception) or item.finish is not None
        self._output.put_nowait(item)
