"""Requests whose sampling is more than a temperature, and one way to ask for them all: the same of every cluster."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field

import grpc

from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.requests import TokenLogprob

CITY_KEYS = ["city", "capital", "river"]
RIVERS = ["Seine", "Spree", "Tiber"]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "capital": {"type": "boolean"},
        "river": {"enum": RIVERS},
    },
    "required": CITY_KEYS,
    "additionalProperties": False,
}
CODE = r"[A-Z]{3}-[0-9]{4}"
CALL = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<call>",
        "content": {"type": "json_schema", "json_schema": {"type": "object", "properties": {"n": {"enum": [1, 2]}}}},
        "end": "</call>",
    },
}
EARLY_END = "<|im_start|>user\nAnswer with one word: yes or no?<|im_end|>\n<|im_start|>assistant\n"
# The token that these two requests are about: " the".
THE = 260


def _request(text: str, logprobs: int | None = None, **sampling: object) -> generate_pb2.GenerateRequest:
    given = {"temperature": 0, "max_new_tokens": 24, **sampling}
    params = generate_pb2.SamplingParams(**given)  # pyright: ignore[reportArgumentType]
    return generate_pb2.GenerateRequest(text=text, sampling=params, logprobs=logprobs)


PARIS = "The capital of France is"
CASES = {
    "plain": _request(PARIS),
    "json schema": _request("Paris, as JSON: ", json_schema=json.dumps(CITY), max_new_tokens=64),
    "json object": _request('{"a": 1}, {"b": 2}, ', json_schema='{"type": "object"}', max_new_tokens=64),
    "regex": _request("The code of the lock is ", regex=CODE),
    "regex, sampled": _request("The code of the lock is ", regex=CODE, temperature=1.0, seed=5),
    "ebnf": _request("Is Paris in France? ", ebnf='root ::= ("yes" | "no") "."'),
    "structural tag": _request("Call it: ", structural_tag=json.dumps(CALL), max_new_tokens=64),
    "grammar, cut": _request("The code of the lock is ", regex=CODE, max_new_tokens=2),
    "ends early": _request(EARLY_END, max_new_tokens=64),
    "min tokens": _request(EARLY_END, max_new_tokens=64, min_new_tokens=40),
    "min tokens, stop token": _request(PARIS, max_new_tokens=20, min_new_tokens=10, stop_token_ids=[30]),
    "stop token": _request(PARIS, max_new_tokens=20, stop_token_ids=[30]),
    "forced": _request(PARIS, logit_bias={THE: 100.0}, max_new_tokens=5),
    "logprobs, greedy": _request(PARIS, logprobs=5),
    "logprobs, of the token alone": _request(PARIS, logprobs=0),
    "logprobs, sampled": _request(PARIS, logprobs=20, temperature=1.0, seed=7),
    "logprobs, hot": _request(PARIS, logprobs=3, temperature=1.7, top_p=0.9, seed=7),
    "logprobs, one token": _request(PARIS, logprobs=2, max_new_tokens=1),
    "logprobs, regex": _request("The code of the lock is ", logprobs=5, regex=CODE),
    "logprobs, min tokens": _request(EARLY_END, logprobs=1, max_new_tokens=48, min_new_tokens=40),
}


@dataclass
class Given:
    """One answer, as the stream brought it."""

    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finished: generate_pb2.Finished = field(default_factory=generate_pb2.Finished)

    @property
    def stopped(self) -> bool:
        """Whether it ended by itself, and was not cut."""
        return self.finished.reason == generate_pb2.FINISH_REASON_STOP

    def add(self, response: generate_pb2.GenerateResponse, *, with_logprobs: bool) -> None:
        """One message; each of its tokens has its own log probability where they were asked for, and none else."""
        expected = list(response.token_ids) if with_logprobs else []
        assert [each.token_id for each in response.logprobs] == expected
        self.token_ids += response.token_ids
        self.text += response.text
        self.logprobs += map(TokenLogprob.from_proto, response.logprobs)
        self.finished.CopyFrom(response.finished)


async def ask(endpoint: str, request: generate_pb2.GenerateRequest) -> Given:
    """One answer. Raises RequestError."""
    given = Given()
    async with grpc.aio.insecure_channel(endpoint) as channel:
        try:
            async for response in generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=180):
                given.add(response, with_logprobs=request.HasField("logprobs"))
        except grpc.aio.AioRpcError as error:
            raise RequestError.from_rpc_error(error) from None
    return given


async def ask_all_cases(endpoint: str) -> dict[str, Given]:
    """Every case, one after the other."""
    return {name: await ask(endpoint, request) for name, request in CASES.items()}


async def ask_all_cases_at_once(endpoint: str) -> dict[str, Given]:
    """Every case in one batch of the engine's."""
    answers = await asyncio.gather(*(ask(endpoint, request) for request in CASES.values()))
    return dict(zip(CASES, answers, strict=True))
