"""How the outputs of a request become the items of a response, and which events tell of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from services.frontend.edge.logprobs import ChatLogprob, chat_tokens
from services.frontend.edge.responses_api.bodies import (
    FunctionCallOutput,
    ItemStatus,
    MessageOutput,
    OutputItem,
    OutputTextPart,
    ReasoningOutput,
    ReasoningTextPart,
)
from services.frontend.request.api import Output, ToolCallDelta
from services.requests import TokenLogprob

Emit = Callable[[str, dict[str, Any]], None]
"""Is told an event's type without `response.` in front, and its fields."""


class OpenItem:
    """An item that is being written. `place` is its index among the items."""

    def __init__(self, item: OutputItem, place: int, emit: Emit) -> None:
        self.item = item
        self._pieces: list[str] = []
        self._place = place
        self._emit = emit
        # As it is now: the parts come later.
        emit("output_item.added", {"output_index": place, "item": dict(item)})

    def add(self, piece: str, logprobs: list[ChatLogprob]) -> None:
        """What is new of its text or its arguments."""
        raise NotImplementedError

    def finish(self, status: ItemStatus) -> None:
        """Nothing more comes."""
        self._complete("".join(self._pieces))
        self.item["status"] = status
        self._emit("output_item.done", {"output_index": self._place, "item": self.item})

    def _complete(self, whole: str) -> None:
        raise NotImplementedError

    def _tell(self, event: str, **fields: Any) -> None:
        self._emit(event, {"item_id": self.item["id"], "output_index": self._place, **fields})


class OpenMessage(OpenItem):
    """A message, with one text."""

    def __init__(self, place: int, emit: Emit) -> None:
        self._message = MessageOutput(
            id=_fresh("msg"), type="message", role="assistant", status="in_progress", content=[]
        )
        super().__init__(self._message, place, emit)
        self._logprobs: list[ChatLogprob] = []
        self._tell("content_part.added", content_index=0, part=_text_part("", []))

    def add(self, piece: str, logprobs: list[ChatLogprob]) -> None:
        """See `OpenItem`."""
        self._pieces.append(piece)
        self._logprobs += logprobs
        self._tell("output_text.delta", content_index=0, delta=piece, logprobs=logprobs)

    def _complete(self, whole: str) -> None:
        part = _text_part(whole, self._logprobs)
        self._message["content"] = [part]
        self._tell("output_text.done", content_index=0, text=whole, logprobs=self._logprobs)
        self._tell("content_part.done", content_index=0, part=part)


class OpenReasoning(OpenItem):
    """Reasoning, with one text."""

    def __init__(self, place: int, emit: Emit) -> None:
        self._reasoning = ReasoningOutput(
            id=_fresh("rs"), type="reasoning", status="in_progress", summary=[], content=[]
        )
        super().__init__(self._reasoning, place, emit)
        self._tell("content_part.added", content_index=0, part=ReasoningTextPart(type="reasoning_text", text=""))

    def add(self, piece: str, logprobs: list[ChatLogprob]) -> None:
        """See `OpenItem`."""
        self._pieces.append(piece)
        self._tell("reasoning_text.delta", content_index=0, delta=piece)

    def _complete(self, whole: str) -> None:
        part = ReasoningTextPart(type="reasoning_text", text=whole)
        self._reasoning["content"] = [part]
        self._tell("reasoning_text.done", content_index=0, text=whole)
        self._tell("content_part.done", content_index=0, part=part)


class OpenCall(OpenItem):
    """A call, `index` of the answer's."""

    def __init__(self, call: ToolCallDelta, place: int, emit: Emit) -> None:
        self.index = call.index
        self._call = FunctionCallOutput(
            id=_fresh("fc"),
            type="function_call",
            status="in_progress",
            call_id=call.id,
            name=call.name,
            arguments="",
        )
        super().__init__(self._call, place, emit)

    def add(self, piece: str, logprobs: list[ChatLogprob]) -> None:
        """See `OpenItem`."""
        self._pieces.append(piece)
        self._tell("function_call_arguments.delta", delta=piece)

    def _complete(self, whole: str) -> None:
        self._call["arguments"] = whole
        self._tell("function_call_arguments.done", name=self._call["name"], arguments=whole)


class OutputItems:
    """The items so far. Only the last one is open; what belongs to another kind of item closes it."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._items: list[OutputItem] = []
        self._open: OpenItem | None = None
        self._logprobs: list[TokenLogprob] = []
        self._tokens = 0
        self.reasoning_tokens = 0

    @property
    def items(self) -> list[OutputItem]:
        """All of them, in the order in which the model made them."""
        return self._items

    def take(self, output: Output) -> None:
        """What is new."""
        self._tokens += len(output.token_ids)
        self._logprobs += output.logprobs
        if output.reasoning:
            self.reasoning_tokens = self._tokens
            self._logprobs.clear()
            self._item(OpenReasoning).add(output.reasoning, [])
        if output.text:
            # Text may lag behind tokens.
            logprobs, self._logprobs = chat_tokens(self._logprobs), []
            self._item(OpenMessage).add(output.text, logprobs)
        for call in output.tool_calls:
            self._logprobs.clear()
            item = self._call(call)
            if call.arguments:
                item.add(call.arguments, [])

    def finish(self, status: ItemStatus) -> None:
        """Nothing more comes; `status` is that of the last item."""
        if self._open is not None:
            self._open.finish(status)
            self._open = None

    def _item(self, kind: type[OpenMessage] | type[OpenReasoning]) -> OpenItem:
        if isinstance(self._open, kind):
            return self._open
        self.finish("completed")
        return self._opened(kind(len(self._items), self._emit))

    def _call(self, call: ToolCallDelta) -> OpenItem:
        if isinstance(self._open, OpenCall) and self._open.index == call.index:
            return self._open
        self.finish("completed")
        return self._opened(OpenCall(call, len(self._items), self._emit))

    def _opened(self, item: OpenItem) -> OpenItem:
        self._open = item
        self._items.append(item.item)
        return item


def _text_part(text: str, logprobs: list[ChatLogprob]) -> OutputTextPart:
    return OutputTextPart(type="output_text", text=text, annotations=[], logprobs=logprobs)


def _fresh(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
