"""Which parsers there are, by the names that SGLang gives them and workers publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.frontend.parsers.tool_calls import CallSyntax


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes its calls, and what a grammar must make of one."""

    syntax: CallSyntax
    before_name: str
    """What a grammar puts before the function's name, `syntax.begin` included."""
    after_arguments: str
    """What a grammar puts behind the arguments."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """`<think>` to `</think>`."""

    always: bool = False
    """The answer begins with reasoning even if neither prompt nor model opens it."""
    call_marker: str = ""
    """Ends reasoning that the model forgot to close."""


_TOOL_CALL = CallSyntax(begin="<tool_call>", end="</tool_call>")
_HERMES = ToolFormat(_TOOL_CALL, '<tool_call>{"name":"', "}</tool_call>")
_QWEN = ToolFormat(_TOOL_CALL, '<tool_call>\n{"name":"', "}\n</tool_call>")
_PYTHON_TAG = CallSyntax(begin="<|python_tag|>", bare=True, separator=";")
_LLAMA3 = ToolFormat(_PYTHON_TAG, '<|python_tag|>{"name":"', "}")

TOOL_FORMATS: Mapping[str, ToolFormat] = {"hermes": _HERMES, "llama3": _LLAMA3, "qwen": _QWEN, "qwen25": _QWEN}

_R1 = ReasoningFormat(always=True)
_QWEN3 = ReasoningFormat(call_marker="<tool_call>")
_QWEN3_THINKING = ReasoningFormat(always=True, call_marker="<tool_call>")

# Those of SGLang's that read <think> and nothing else. When they begin is the rendered prompt's affair first.
REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "deepseek-r1": _R1,
    "deepseek-v3": _QWEN3,
    "glm45": _QWEN3,
    "interns1": _QWEN3,
    "mimo": _QWEN3,
    "minimax": _QWEN3_THINKING,
    "nemotron_3": _QWEN3,
    "qwen3": _QWEN3,
    "qwen3-thinking": _QWEN3_THINKING,
    "step3": _R1,
    "step3p5": _R1,
}
