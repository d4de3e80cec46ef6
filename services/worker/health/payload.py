"""`--health-check-payload`: what the warm-up, `Probe` and the canary generate from, or embed.

Written as the fields `token_ids` and `sampling` of a GenerateRequest, in protobuf's JSON. Every other field is the
probe's own: in a disaggregated role its peer is pretended, and its rank is whichever is asked.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf import json_format

from kvbaton import token_ids
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2
from services.requests import Limits, Role, check_prompt, check_sampling, sent_tokens
from services.worker.engines.protocol import ProbePayload

_FLAG = "--health-check-payload"
_FIELDS = frozenset({"token_ids", "sampling"})
_FRONTENDS = frozenset({"stop", "skip_special_tokens"})


class HealthCheck:
    """What an operator wants probed. Checked twice: its form at once, its values when the model's limits are known."""

    def __init__(self, request: generate_pb2.GenerateRequest | None) -> None:
        self._request = request

    @classmethod
    def parse(cls, flag: str, role: Role) -> HealthCheck:
        """`flag` is JSON, @FILE, or empty for one greedy token. Raises ValueError naming the flag and the field."""
        if not flag:
            return cls(None)
        try:
            text = Path(flag[1:]).expanduser().read_text() if flag.startswith("@") else flag
            request = json_format.Parse(text, generate_pb2.GenerateRequest())
        except (OSError, json_format.ParseError) as error:
            raise ValueError(f"{_FLAG}: {error}") from error
        for field, _ in request.ListFields():
            if field.name not in _FIELDS:
                raise ValueError(f"{_FLAG}: {field.name} is the probe's own; say token_ids and sampling")
        for field, _ in request.sampling.ListFields():
            if field.name in _FRONTENDS:
                raise ValueError(f"{_FLAG}: sampling.{field.name} is the frontend's")
        if role is Role.EMBEDDING and request.HasField("sampling"):
            raise ValueError(f"{_FLAG}: sampling: an embedding worker samples nothing")
        if not token_ids.count(request.token_ids):
            raise ValueError(f"{_FLAG}: token_ids.ids is missing")
        return cls(request)

    def payload(self, limits: Limits) -> ProbePayload:
        """What the engine gets; one greedy token where nothing else is said. Raises ValueError naming the field."""
        if self._request is None:
            return ProbePayload()
        params = generate_pb2.SamplingParams(max_new_tokens=1, temperature=0.0)
        params.MergeFrom(self._request.sampling)
        try:
            tokens = check_prompt(sent_tokens(self._request.token_ids), limits)
            return ProbePayload(tuple(tokens), check_sampling(params, prompt_tokens=len(tokens), limits=limits))
        except RequestError as error:
            raise ValueError(f"{_FLAG}: {error.message}") from error
