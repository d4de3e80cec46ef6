"""One request to the frontend, and how an error's proto field gets the name that it has on the route."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2
from services.requests import check_request_id

HEADER_OF = {"prefill_worker": "x-kvbaton-prefill-worker", "decode_worker": "x-kvbaton-decode-worker"}
"""Fields that no body has, and the headers that they come from."""

_INPUT_FIELDS = ("text", "token_ids", "chat", "input")


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the frontend; `name_of` turns a field of it into the field of the body that it came from."""

    request: generate_pb2.GenerateRequest
    name_of: Callable[[str], str]

    @property
    def choices(self) -> int:
        """How many answers it has."""
        return self.request.n if self.request.HasField("n") else 1

    def in_openai_terms(self, error: RequestError, request_id: str) -> RequestError:
        """The same error with OpenAI's field name, in `field` and in the message, and with the HTTP request's id."""
        return renamed(error, HEADER_OF.get(error.field) or self.name_of(error.field), request_id)


def renamed(error: RequestError, name: str, request_id: str) -> RequestError:
    """The same error with its field's name on the route, in `field` and in the message, and with the request's id."""
    message = error.message
    if error.field and message.startswith(f"{error.field}:"):
        message = name + message.removeprefix(error.field)
    return dataclasses.replace(error, field=name, message=message, request_id=request_id)


def openai_name(field: str, renames: Mapping[str, str], input_name: str) -> str:
    """The name of a field without a place inside the input; `renames` has those that differ."""
    if field in renames:
        return renames[field]
    head, _, rest = field.partition(".")
    if head == "sampling" and rest:
        return rest
    return input_name if head in _INPUT_FIELDS else field


def request_id(header: str | None, prefix: str) -> str:
    """The client's `x-request-id` where it is one of ours in form, else a fresh id."""
    if header:
        try:
            return check_request_id(header)
        except RequestError:
            pass  # A header is no request field: another system's trace id must not fail the request.
    return prefix + secrets.token_hex(16)
