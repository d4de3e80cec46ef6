"""How the body of a completion becomes kvbaton.v1 requests, one for each prompt."""

from __future__ import annotations

from functools import partial

from kvbaton.errors import invalid
from kvbaton.token_ids import pack
from kvbaton.v1 import generate_pb2
from services.frontend.edge.calls import Call, openai_name
from services.frontend.edge.completions.schema import CompletionRequest, PromptValue
from services.frontend.edge.formats import grammar_of
from services.frontend.edge.outputs import Work
from services.frontend.edge.sampling import MAX_CHOICES, Grammar, chosen_grammar, sampling_params
from services.requests import MAX_REQUEST_ID_BYTES

DEFAULT_MAX_TOKENS = 16

_NAMES = {"sampling.min_new_tokens": "min_tokens", "sampling.max_new_tokens": "max_tokens"}


def completion_work(body: CompletionRequest, request_id: str) -> Work:
    """Raises RequestError for fields that contradict each other."""
    n = body.n or 1
    if body.best_of not in (None, n):
        raise invalid("best_of", f"only the same as n, {n}, is supported")
    if body.echo and body.logprobs is not None:
        raise invalid("echo", "not together with logprobs: a prompt's log probabilities are not computed")
    if n * len(body.prompt) > MAX_CHOICES:
        raise invalid("n", f"{len(body.prompt)} prompts with {n} answers each, at most {MAX_CHOICES} answers")
    grammar = chosen_grammar(body, grammar_of(body.response_format), _schema_of(body))
    if len(body.prompt) == 1:
        return Work(request_id, [_call(body, request_id, body.prompt[0], "prompt", grammar)])
    calls = [
        _call(body, _id_of_prompt(request_id, place), prompt, f"prompt[{place}]", grammar)
        for place, prompt in enumerate(body.prompt)
    ]
    return Work(request_id, calls)


def _id_of_prompt(request_id: str, place: int) -> str:
    """Tells whose it is, unless the client's id is so long that only a fresh one is left."""
    own = f"{request_id}-{place}"
    return own if len(own) <= MAX_REQUEST_ID_BYTES else ""


def _call(
    body: CompletionRequest, request_id: str, prompt: PromptValue, input_name: str, grammar: Grammar | None
) -> Call:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    request = generate_pb2.GenerateRequest(
        request_id=request_id,
        model=body.model,
        sampling=sampling_params(body, max_tokens, grammar),
        priority=body.priority,
        allow_inexact_migration=body.allow_inexact_migration,
        n=body.n,
        logprobs=body.logprobs,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(pack(prompt))
    renames = _NAMES if grammar is None else _NAMES | {f"sampling.{grammar.kind}": grammar.place}
    return Call(request, partial(openai_name, renames=renames, input_name=input_name))


def _schema_of(body: CompletionRequest) -> Grammar | None:
    return None if body.json_schema is None else Grammar("json_schema", "json_schema", body.json_schema)
