"""How a response is written, as a whole and as a stream; both are made of the same items."""

from __future__ import annotations

from typing import Any

import orjson

from kvbaton.errors import RequestError
from services.frontend.edge.answer import Answer, BodyWriter, EventWriter
from services.frontend.edge.errors import error_body, internal_error
from services.frontend.edge.responses_api.bodies import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseFailure,
    ResponseUsage,
)
from services.frontend.edge.responses_api.output import OutputItems
from services.frontend.edge.responses_api.schema import NamedTool, ResponsesRequest
from services.frontend.edge.wire import named_event
from services.frontend.request.api import Finished, FinishReason, Output


class ResponseBody(BodyWriter):
    """The whole answer."""

    def __init__(self, answer: Answer, body: ResponsesRequest) -> None:
        self._response = _in_progress(answer, body)
        self._items = OutputItems(lambda _type, _fields: None)
        self._finished: Finished | None = None

    def take(self, output: Output) -> None:
        """See `BodyWriter`."""
        self._items.take(output)
        self._finished = output.finished

    def body(self) -> bytes:
        """See `BodyWriter`."""
        _end(self._response, self._items, self._finished)
        return orjson.dumps(self._response)


class ResponseEvents(EventWriter):
    """The stream: events have names and numbers, the last one is the whole answer; there is no [DONE]."""

    def __init__(self, answer: Answer, body: ResponsesRequest) -> None:
        self._response = _in_progress(answer, body)
        self._items = OutputItems(self._emit)
        self._finished: Finished | None = None
        self._number = 0
        self._written: list[bytes] = []

    def events(self, output: Output) -> bytes:
        """See `EventWriter`."""
        if self._number == 0:
            self._emit("created", {"response": self._response})
            self._emit("in_progress", {"response": self._response})
        self._items.take(output)
        self._finished = output.finished
        return self._flushed()

    def closing(self) -> bytes:
        """See `EventWriter`."""
        _end(self._response, self._items, self._finished)
        self._emit(self._response["status"], {"response": self._response})
        return self._flushed()

    def failed(self, error: RequestError) -> bytes:
        """See `EventWriter`. What went wrong, and then the response as far as it got."""
        detail = error_body(error)["error"]
        self._write("error", {"code": detail["code"], "message": detail["message"], "param": detail["param"]})
        self._items.finish("incomplete")
        self._response["status"] = "failed"
        self._response["error"] = ResponseFailure(code="server_error", message=detail["message"])
        self._response["output"] = self._items.items
        self._emit("failed", {"response": self._response})
        return self._flushed()

    def _emit(self, event: str, fields: dict[str, Any]) -> None:
        self._write(f"response.{event}", fields)

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        self._written.append(named_event(event, {"type": event, "sequence_number": self._number, **fields}))
        self._number += 1

    def _flushed(self) -> bytes:
        events = b"".join(self._written)
        self._written.clear()
        return events


def _end(response: Response, items: OutputItems, finished: Finished | None) -> None:
    """Raises RequestError for an answer without an end."""
    if finished is None:
        raise internal_error("the answer ended without a finish reason")
    cut_off = finished.reason is FinishReason.LENGTH
    items.finish("incomplete" if cut_off else "completed")
    response["status"] = "incomplete" if cut_off else "completed"
    response["incomplete_details"] = IncompleteDetails(reason="max_output_tokens") if cut_off else None
    response["output"] = items.items
    response["usage"] = ResponseUsage(
        input_tokens=finished.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=finished.cached_prompt_tokens),
        output_tokens=finished.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=items.reasoning_tokens),
        total_tokens=finished.prompt_tokens + finished.completion_tokens,
    )


def _in_progress(answer: Answer, body: ResponsesRequest) -> Response:
    """What is known before the model says anything: the request, mostly."""
    reasoning = {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None}
    given = None if body.text is None else body.text.format
    choice = body.tool_choice or "auto"
    return Response(
        id=answer.id,
        object="response",
        created_at=answer.created,
        status="in_progress",
        background=False,
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=answer.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=None,
        reasoning=reasoning,
        service_tier="default",
        store=False,
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": {"type": "text"} if given is None else given.model_dump(by_alias=True), "verbosity": "medium"},
        tool_choice=choice.model_dump() if isinstance(choice, NamedTool) else choice,
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        truncation="disabled",
        usage=None,
    )
