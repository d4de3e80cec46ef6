"""What schemathesis's requests need to reach the engine; its command line loads this module (SCHEMATHESIS_HOOKS)."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
LONGEST = 64


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Random names of models would all end at 404, and random lengths would generate for minutes."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = os.environ["FUZZ_EMBEDDING_MODEL" if "embeddings" in case.path else "FUZZ_MODEL"]
    for name in LENGTHS:
        length = body.get(name)
        if type(length) is int and length > LONGEST:
            body[name] = length % LONGEST
