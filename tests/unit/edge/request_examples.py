"""A body for every field of every route: what it takes to send the field, and two values that differ."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

from tests.unit.edge.fakes import MODEL

LEFT_OUT = object()

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OTHER_SCHEMA = {"type": "object"}
_FUNCTION = {"name": "f"}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TOOL = {"type": "function", "function": _FUNCTION}
_USER = {"role": "user", "content": "Hi"}
_TEXT = {"type": "text", "text": "Hi"}
_JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}

MINIMAL: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [_USER]},
    "/v1/completions": {"model": MODEL, "prompt": "Once"},
    "/v1/embeddings": {"model": MODEL, "input": "Once"},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
}

VARIANTS: dict[str, Any] = {
    "messages[system]": {"role": "system", "content": "Hi"},
    "messages[developer]": {"role": "developer", "content": "Hi"},
    "messages[user]": _USER,
    "messages[assistant]": {"role": "assistant", "content": "Hi"},
    "messages[tool]": {"role": "tool", "content": "Hi", "tool_call_id": "call_1"},
    "content[text]": _TEXT,
    "tool_calls[function]": _CALL,
    "tools[function]": _TOOL,
    "tool_choice[function]": {"type": "function", "function": _FUNCTION},
    "response_format[text]": {"type": "text"},
    "response_format[json_object]": {"type": "json_object"},
    "response_format[json_schema]": _JSON_SCHEMA,
    "response_format[structural_tag]": {"type": "structural_tag", "format": {"type": "any_text"}},
    "input[message]": {"role": "user", "content": "Hi"},
    "input[assistant]": {"role": "assistant", "content": "Hi"},
    "input[function_call]": {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
    "input[function_call_output]": {"type": "function_call_output", "call_id": "call_1", "output": "Hi"},
    "content[input_text]": {"type": "input_text", "text": "Hi"},
    "content[output_text]": {"type": "output_text", "text": "Hi"},
    "output[input_text]": {"type": "input_text", "text": "Hi"},
    "content[reasoning_text]": {"type": "reasoning_text", "text": "Hi"},
    "summary[summary_text]": {"type": "summary_text", "text": "Hi"},
    "format[json_schema]": {"type": "json_schema", "name": "n", "schema": SCHEMA},
    "/v1/responses tools[function]": {"type": "function", **_FUNCTION},
    "/v1/responses tool_choice[function]": {"type": "function", **_FUNCTION},
    # Refused ones; of those that are not here the type alone is enough.
    "messages[function]": {"role": "function", "content": "Hi", "name": "f"},
    "content[image_url]": {"type": "image_url", "image_url": {"url": "x"}},
    "content[input_audio]": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    "content[file]": {"type": "file", "file": {"file_id": "x"}},
    "content[refusal]": {"type": "refusal", "refusal": "no"},
    "tool_calls[custom]": {"id": "call_1", "type": "custom", "custom": {"name": "f", "input": ""}},
    "tools[custom]": {"type": "custom", "custom": {"name": "f"}},
    "tool_choice[custom]": {"type": "custom", "custom": {"name": "f"}},
    "tool_choice[allowed_tools]": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
}
"""By a step of a path, or by route and step."""

LISTS = {"messages", "content", "tool_calls", "tools", "input", "summary", "output"}

NEEDS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [_TOOL]},
    "stream_options": {"stream": True},
    "stream_options.continuous_usage_stats": {"stream": True, "stream_options": {"include_usage": True}},
    "continue_final_message": {"messages": [_USER, {"role": "assistant", "content": "He"}]},
    "messages[assistant].content": {"messages": [{"role": "assistant", "tool_calls": [_CALL]}]},
    "/v1/responses tool_choice": {"tools": [{"type": "function", **_FUNCTION}]},
}
"""What a field, or what is below it, can't do without; by path, or by route and path."""

VALUES: dict[str, tuple[Any, Any]] = {
    "model": (MODEL, "other"),
    "messages": ([_USER], [_USER, _USER]),
    "prompt": ("Once", [1, 2]),
    "input": ("Once", [1, 2]),
    "temperature": (0.5, LEFT_OUT),
    "top_p": (0.5, LEFT_OUT),
    "stream": (True, LEFT_OUT),
    "frequency_penalty": (0.5, LEFT_OUT),
    "presence_penalty": (0.5, LEFT_OUT),
    "logit_bias": ({"5": 1}, LEFT_OUT),
    "seed": (5, LEFT_OUT),
    "stop": ("END", LEFT_OUT),
    "top_k": (5, LEFT_OUT),
    "min_p": (0.5, LEFT_OUT),
    "min_tokens": (5, LEFT_OUT),
    "repetition_penalty": (1.5, LEFT_OUT),
    "stop_token_ids": ([5], LEFT_OUT),
    "ignore_eos": (True, LEFT_OUT),
    "skip_special_tokens": (False, LEFT_OUT),
    "priority": (5, LEFT_OUT),
    "allow_inexact_migration": (True, LEFT_OUT),
    "regex": ("a", LEFT_OUT),
    "ebnf": ('root ::= "a"', LEFT_OUT),
    "json_schema": ("{}", LEFT_OUT),
    "max_tokens": (5, LEFT_OUT),
    "max_completion_tokens": (5, LEFT_OUT),
    "max_output_tokens": (5, LEFT_OUT),
    "n": (1, LEFT_OUT),
    "logprobs": (1, LEFT_OUT),
    "/v1/chat/completions logprobs": (True, LEFT_OUT),
    "top_logprobs": (5, LEFT_OUT),
    "echo": (True, LEFT_OUT),
    "best_of": (1, LEFT_OUT),
    "response_format": ({"type": "json_object"}, LEFT_OUT),
    "tools": ([_TOOL], LEFT_OUT),
    "tool_choice": ("auto", LEFT_OUT),
    "parallel_tool_calls": (False, LEFT_OUT),
    "reasoning_effort": ("high", LEFT_OUT),
    "chat_template_kwargs": ({"a": 1}, LEFT_OUT),
    "separate_reasoning": (False, LEFT_OUT),
    "add_generation_prompt": (False, LEFT_OUT),
    "continue_final_message": (True, LEFT_OUT),
    "stream_options": ({"include_usage": True}, LEFT_OUT),
    "include_usage": (True, LEFT_OUT),
    "continuous_usage_stats": (True, LEFT_OUT),
    "metadata": ({"a": "b"}, LEFT_OUT),
    "prompt_cache_key": ("a", LEFT_OUT),
    "safety_identifier": ("a", LEFT_OUT),
    "user": ("a", LEFT_OUT),
    "encoding_format": ("base64", LEFT_OUT),
    "dimensions": (5, LEFT_OUT),
    "truncate": (True, LEFT_OUT),
    # Of messages, tools and formats.
    "content": ("Hi", "Ho"),
    "text": ("Hi", "Ho"),
    "name": ("f", "g"),
    "messages[user].name": ("a", LEFT_OUT),
    "reasoning_content": ("Hm", LEFT_OUT),
    "tool_calls": ([_CALL], LEFT_OUT),
    "tool_call_id": ("call_1", "call_2"),
    "id": ("call_1", "call_2"),
    "function": ({"name": "f"}, {"name": "g"}),
    "tool_calls[function].function": ({"name": "f", "arguments": ""}, {"name": "g", "arguments": ""}),
    "arguments": ("{}", '{"a": 1}'),
    "description": ("d", LEFT_OUT),
    "parameters": (SCHEMA, LEFT_OUT),
    "strict": (True, LEFT_OUT),
    "schema": (SCHEMA, OTHER_SCHEMA),
    "response_format[json_schema].json_schema": (
        {"name": "n", "schema": SCHEMA},
        {"name": "n", "schema": OTHER_SCHEMA},
    ),
    "format": ({"type": "any_text"}, {"type": "any"}),
    "index": (0, LEFT_OUT),
    "parsed": ({"a": 1}, LEFT_OUT),
    "parsed_arguments": ({"a": 1}, LEFT_OUT),
    # Of responses.
    "/v1/responses input": ("Hi", "Ho"),
    "/v1/responses tools": ([{"type": "function", **_FUNCTION}], LEFT_OUT),
    # Without it, auto is what is meant.
    "/v1/responses tool_choice": ("required", LEFT_OUT),
    "/v1/responses stream_options": ({}, LEFT_OUT),
    "/v1/responses text": ({"format": {"type": "json_object"}}, LEFT_OUT),
    "text.format": ({"type": "json_object"}, LEFT_OUT),
    "role": ("user", "system"),
    "call_id": ("call_1", "call_2"),
    "output": ("Hi", "Ho"),
    "input[message].id": ("a", LEFT_OUT),
    "input[assistant].id": ("a", LEFT_OUT),
    "input[function_call].id": ("a", LEFT_OUT),
    "input[function_call_output].id": ("a", LEFT_OUT),
    "input[reasoning].id": ("a", LEFT_OUT),
    "input[reasoning].content": ([{"type": "reasoning_text", "text": "Hm"}], LEFT_OUT),
    "status": ("completed", LEFT_OUT),
    "content[output_text].annotations": ([], LEFT_OUT),
    "content[output_text].logprobs": ([], LEFT_OUT),
    "summary": ([{"type": "summary_text", "text": "Hm"}], LEFT_OUT),
    "instructions": ("a", LEFT_OUT),
    "reasoning": ({"effort": "high"}, LEFT_OUT),
    "effort": ("high", LEFT_OUT),
    "include": (["message.output_text.logprobs"], LEFT_OUT),
    # Refused ones; the second value is never sent.
    "encrypted_content": ("a", None),
    "reasoning.summary": ("detailed", None),
    "generate_summary": ("concise", None),
    "background": (True, None),
    "conversation": ("a", None),
    "max_tool_calls": (3, None),
    "previous_response_id": ("a", None),
    "/v1/responses prompt": ({"id": "a"}, None),
    "truncation": ("auto", None),
    "messages[assistant].audio": ({"id": "a"}, None),
    "annotations": ([{}], None),
    "messages[assistant].function_call": (_CALL["function"], None),
    "refusal": ("no", None),
    "include_obfuscation": (True, None),
    "audio": ({"format": "wav", "voice": "alloy"}, None),
    "function_call": ("auto", None),
    "functions": ([_FUNCTION], None),
    "modalities": (["text", "audio"], None),
    "prediction": ({"type": "content", "content": "a"}, None),
    "prompt_cache_retention": ("24h", None),
    "service_tier": ("flex", None),
    "store": (True, None),
    "verbosity": ("low", None),
    "web_search_options": ({}, None),
    "suffix": ("a", None),
}
"""By the end of a path, the longest that is here; or by route and path."""


def values_of(route: str, path: str) -> tuple[Any, Any]:
    """The two values of a field. Raises KeyError for one that has none."""
    steps = path.split(".")
    for key in (f"{route} {path}", *(".".join(steps[place:]) for place in range(len(steps)))):
        if key in VALUES:
            return VALUES[key]
    raise KeyError(f"{route} {path}: give it a value in {__name__}")


def body_with(route: str, path: str, value: Any) -> dict[str, Any]:
    """A body of the route in which the field has the value."""
    body = deepcopy(MINIMAL[route])
    for owner, needed in NEEDS.items():
        if _is_below(path, owner) or _is_below(f"{route} {path}", owner):
            body |= deepcopy(needed)
    *owners, name = path.split(".")
    at: Any = body
    for step in owners:
        at = _entered(at, step, route)
    if value is LEFT_OUT:
        at.pop(name, None)
    else:
        at[name] = value
    return body


def body_as(route: str, path: str) -> dict[str, Any]:
    """A body of the route that has a variant of an object."""
    return body_with(route, f"{path}.nothing", LEFT_OUT)


def _is_below(path: str, owner: str) -> bool:
    return path == owner or path.startswith((f"{owner}.", f"{owner}["))


def _entered(at: dict[str, Any], step: str, route: str) -> Any:
    name, bracket, variant = step.partition("[")
    if not bracket:
        return at.setdefault(name, {})
    kind = variant.removesuffix("]")
    example = deepcopy(VARIANTS.get(f"{route} {step}", VARIANTS.get(step, {"type": kind})))
    if name in LISTS:
        present = at.get(name)
        # What a field needs beside it stands.
        if not (isinstance(present, list) and any(kind in (each.get("role"), each.get("type")) for each in present)):
            at[name] = [example]
        return at[name][0]
    at[name] = example
    return example


def place_of(path: str) -> re.Pattern[str]:
    """What an error calls the field: every list's entry has a number there, and a variant is no step."""
    steps = [re.escape(step.partition("[")[0]) + (r"(\[\d+\])?" if "[" in step else "") for step in path.split(".")]
    return re.compile(r"\.".join(steps))
