"""How is the answer to a chat read, and held: which parsers and which grammar, for the model of a worker's record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from kvbaton.errors import RequestError, invalid
from kvbaton.v1 import worker_pb2
from services.frontend.parsers.catalog import REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat, ToolFormat
from services.frontend.parsers.grammars import SchemaConflictError, behind_reasoning, required_calls, strict_calls
from services.frontend.parsers.protocol import Chain, StreamParser
from services.frontend.parsers.reasoning import THINK, THINK_END, ThinkParser
from services.frontend.parsers.tool_calls import ArrayCalls, MarkedCalls
from services.frontend.request.chat import Chat, ToolMode
from services.requests import MAX_GRAMMAR_BYTES, Grammar, Limits

# SGLang's grammar backends that can't take a grammar behind reasoning.
_NO_SEQUENCES = frozenset(("llguidance", "outlines"))


class Thinking(Enum):
    """What the prompt says of the reasoning."""

    OPEN = auto()
    """The answer begins within it."""
    POSSIBLE = auto()
    """The model may begin it."""
    CLOSED = auto()
    """There is none, or it is over."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What is known before the prompt is."""

    chat: Chat
    grammar_backend: str
    calls: ToolFormat | None
    """None: no calls are looked for."""
    reasoning: ReasoningFormat | None
    """None: it is not told from other text."""

    @property
    def markers(self) -> tuple[str, ...]:
        """What the parsers look for in the text."""
        found: list[str] = []
        if self.reasoning is not None:
            found += [THINK, THINK_END]
        if self.calls is not None and self.chat.tools.mode is ToolMode.AUTO:
            found += filter(None, (self.calls.syntax.begin, self.calls.syntax.end))
        return tuple(found)

    def thinking(self, prompt: str) -> Thinking:
        """`prompt` is the rendered one: a template that opens the reasoning, or closes it, ends with the marker."""
        if self.reasoning is None:
            return Thinking.CLOSED
        if self.chat.continue_final_message:
            prompt = str(self.chat.messages[-1].content or "")
            begun, over = prompt.rfind(THINK), prompt.rfind(THINK_END)
            if begun == over and (self.reasoning.always or prompt.strip()):
                return Thinking.CLOSED  # the answer itself goes on
        else:
            prompt = prompt.rstrip()
            begun, over = prompt.endswith(THINK), prompt.endswith(THINK_END)
        if begun > over:
            return Thinking.OPEN
        if over > begun:
            return Thinking.CLOSED
        return Thinking.OPEN if self.reasoning.always else Thinking.POSSIBLE

    @property
    def single(self) -> bool:
        """Whether the parser ends the answer behind one call; a grammar that demands calls sees to their number."""
        return self.calls is not None and self.chat.tools.mode is ToolMode.AUTO and self.chat.tools.single

    def parser_factory(self, thinking: Thinking) -> Callable[[], StreamParser] | None:
        """Makes a parser for each answer; None where all text is content."""
        if self.calls is None and self.reasoning is None:
            return None
        return lambda: self._parser(thinking)

    def grammar(self, own: Grammar | None, thinking: Thinking) -> tuple[Grammar | None, str]:
        """What holds the answer, the request's own grammar or the tools', and the field it is from.

        Raises RequestError.
        """
        grammar, field = own, "" if own is None else f"sampling.{own.kind.value}"
        tools = self.chat.tools
        try:
            if tools.mode is ToolMode.REQUIRED:
                functions = tools.functions if tools.chosen is None else (tools.chosen,)
                grammar, field = required_calls(functions, single=tools.single), "chat.tool_choice"
            elif self.calls is not None and tools.strict is not None:
                grammar, field = strict_calls(tools.functions, self.calls), "chat.tools"
        except SchemaConflictError as error:
            raise invalid("chat.tools", str(error)) from error
        if grammar is None:
            return None, ""
        if thinking is not Thinking.CLOSED:
            held = behind_reasoning(grammar, opened=thinking is Thinking.OPEN)
            if held is not grammar and self.grammar_backend in _NO_SEQUENCES:
                raise invalid(field, f"not with reasoning: {self.grammar_backend} can't hold an answer behind it")
            grammar = held
        if grammar is not own and (size := len(grammar.source.encode())) > MAX_GRAMMAR_BYTES:
            raise invalid(field, f"its grammar has {size} bytes, at most {MAX_GRAMMAR_BYTES}")
        return grammar, field

    def _parser(self, thinking: Thinking) -> StreamParser:
        tools, calls, reasoning = self.chat.tools, self.calls, self.reasoning
        call_parser: StreamParser | None = None
        if calls is not None and tools.mode is ToolMode.REQUIRED:
            call_parser = ArrayCalls(tools.names)
        elif calls is not None:
            call_parser = MarkedCalls(calls.syntax, tools.names, single=self.single)
        if reasoning is None:
            assert call_parser is not None
            return call_parser
        # Also behind reasoning that the prompt has closed: the model may begin another.
        marker = "" if call_parser is None else reasoning.call_marker
        think_parser = ThinkParser(inside=thinking is Thinking.OPEN, call_marker=marker)
        return think_parser if call_parser is None else Chain(think_parser, call_parser)


def plan_answer(chat: Chat, runtime: worker_pb2.RuntimeConfig, limits: Limits, *, has_grammar: bool) -> ChatAnswer:
    """`has_grammar`: the request brings one of its own. Raises RequestError naming the field."""
    calls = None
    if chat.tools.mode is not ToolMode.NONE:
        calls = TOOL_FORMATS.get(runtime.tool_call_parser)
        if calls is None:
            raise _no_parser("chat.tools", "tool", runtime.tool_call_parser, TOOL_FORMATS)
        _check_grammar(chat, limits, has_grammar)
    reasoning = None
    if chat.separate_reasoning is not False and runtime.reasoning_parser:
        reasoning = REASONING_FORMATS.get(runtime.reasoning_parser)
        if reasoning is None and chat.separate_reasoning:
            raise _no_parser("chat.separate_reasoning", "reasoning", runtime.reasoning_parser, REASONING_FORMATS)
    return ChatAnswer(chat, runtime.grammar_backend, calls, reasoning)


def _check_grammar(chat: Chat, limits: Limits, has_grammar: bool) -> None:
    """Whether what the tools ask of a grammar can be had."""
    field = ""
    if chat.tools.mode is ToolMode.REQUIRED:
        field = "chat.tool_choice"
    elif chat.tools.strict is not None:
        field = f"chat.tools[{chat.tools.strict}].strict"
    if not field:
        return
    if not limits.grammar:
        raise invalid(field, "the workers' engine has no grammar backend")
    if has_grammar:
        raise invalid(field, "the request has a grammar of its own")


def _no_parser(field: str, kind: str, name: str, there_are: Iterable[str]) -> RequestError:
    lacking = f"is unknown here: {name!r}" if name else "is missing"
    return invalid(
        field, f"the {kind} parser of the model's worker {lacking}; there are {', '.join(sorted(there_are))}"
    )
