"""How a failure becomes an HTTP status and OpenAI's error body."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import grpc
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from typing_extensions import TypedDict

from kvbaton.errors import Reason, RequestError
from services.frontend.edge.values import IN_FIELD
from services.frontend.edge.wire import json_response

MAX_REPORTED_FIELDS = 8

STATUS_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    # What the request asks for and the model can't do, for example a chat with a model that has no tokenizer.
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    # nginx's "client closed request": nobody waits for the answer, or someone aborted the request by its id.
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    # A worker ended the request. Not gRPC's usual 409, which the OpenAI SDK reads as a conflict between requests.
    grpc.StatusCode.ABORTED: 502,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""Every other code is 500."""

_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    504: "timeout_error",
}
_DEFAULT_RETRY_SECONDS = {429: 1.0}


class ErrorDetail(TypedDict):
    """What went wrong; `param` is the request field at fault, `code` a stable lower-case word."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    """Every answer that is not a success, and the last event of a stream that failed."""

    error: ErrorDetail


class HttpError(HTTPException):
    """A refusal that has no counterpart in gRPC."""

    def __init__(self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail=message, headers=headers)
        self.code = code


def install(app: FastAPI) -> None:
    """Makes every error answer of the app an `ErrorBody`."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


def status_of(error: RequestError) -> int:
    """The HTTP status."""
    return STATUS_BY_CODE.get(error.code, 500)


def error_body(error: RequestError) -> ErrorBody:
    """The body of a typed error."""
    return _body(status_of(error), error.reason.lower(), error.message, error.field or None)


def error_response(error: RequestError, more_headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    """The whole answer of a typed error, with when to come back where that is known."""
    status = status_of(error)
    headers = dict(more_headers)
    if error.request_id:
        headers["x-request-id"] = error.request_id
    retry_after = error.retry_after if error.retry_after is not None else _DEFAULT_RETRY_SECONDS.get(status)
    if retry_after is not None:
        headers["retry-after"] = str(math.ceil(retry_after))
        # Read by the OpenAI SDK before the header in whole seconds.
        headers["retry-after-ms"] = str(math.ceil(retry_after * 1000))
    return json_response(error_body(error), status=status, headers=headers)


def internal_error(message: str) -> RequestError:
    """A failure that is our own fault, without its details."""
    return RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, message)


def _body(status: int, code: str, message: str, param: str | None = None) -> ErrorBody:
    default = "server_error" if status >= 500 else "invalid_request_error"
    kind = _TYPE_BY_STATUS.get(status, default)
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


async def _on_request_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return json_response(_invalid_fields(error.errors()), status=400)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    status, headers = error.status_code, error.headers
    if isinstance(error, HttpError):
        body = _body(status, error.code, error.detail)
    elif status == 404:
        body = _body(status, "route_not_found", f"no such route: {request.method} {request.url.path}")
    elif status == 405:
        body = _body(status, "method_not_allowed", f"{request.method} is not allowed on {request.url.path}")
    else:
        body = _body(status, "http_error", str(error.detail))
    return json_response(body, status=status, headers=headers)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    # Starlette raises the error again, so the server logs it with its traceback.
    return json_response(error_body(internal_error("internal error")), status=500)


def _invalid_fields(problems: Sequence[Any]) -> ErrorBody:
    """Names every field at fault in the message, the first one in `param`."""
    named = [(_param(problem), _complaint(problem)) for problem in problems[:MAX_REPORTED_FIELDS]]
    message = "; ".join(f"{param}: {complaint}" if param else complaint for param, complaint in named)
    code = "unsupported_field" if problems[0]["type"] == "extra_forbidden" else Reason.INVALID_FIELD.lower()
    return _body(400, code, message, named[0][0])


def _param(problem: Mapping[str, Any]) -> str | None:
    """`messages[0].content` for ("body", "messages", 0, "<user>", "content"); None for the body as a whole."""
    location: list[str | int] = [*problem["loc"][1:]]
    if problem["type"] == IN_FIELD and isinstance(problem["input"], dict):
        location.append(problem["ctx"]["field"])
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        # In angle brackets stands the variant of a union, see values.told_by; "[key]" is pydantic's word for a key.
        elif not step.startswith(("<", "[")):
            path += f".{step}"
    return path.removeprefix(".") or None


def _complaint(problem: Mapping[str, Any]) -> str:
    if len(problem["loc"]) == 1:
        return "the body must be a JSON object"
    match problem["type"]:
        case kind if kind == IN_FIELD and not isinstance(problem["input"], dict):
            return "must be an object"
        case "extra_forbidden":
            return "not supported"
        case "missing":
            return "required"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            message: str = problem["msg"]
            return message[:1].lower() + message[1:]
