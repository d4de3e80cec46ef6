"""Which prompt do these messages make: a model's chat template, rendered as transformers renders it.

A template comes with the model and is not trusted. It runs in Jinja's immutable sandbox (nothing that leads into
Python, no changes to what it is given, `range` of at most 100 000), is compiled once, and every rendering has a
budget (`TemplateLimits`). Not bounded are the arguments of Jinja's filters (`'x'|center(10**9)`): a hostile template
can still cost memory.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, cast

import jinja2
from jinja2 import nodes

from services.frontend.text.template_sandbox import (
    LimitExceededError,
    RefusedByTemplateError,
    TemplateEnvironment,
    TemplateLimits,
)

Content: TypeAlias = str | Sequence[Mapping[str, Any]] | None

# Stands behind a message that is continued, while the template renders it.
_END_OF_CONTENT = "\N{SYMBOL FOR END OF TEXT}kvbaton\N{SYMBOL FOR END OF TEXT}"

RESERVED_ARGUMENTS = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
"""Template variables that are fields of their own."""


class ChatTemplateError(Exception):
    """The model's template is missing, cannot be compiled, fails, or takes too much."""


class InvalidMessagesError(ChatTemplateError):
    """The request's fault: content that is not text, or messages that the template itself refuses."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: Content = None
    """Text, or text parts `{"type": "text", "text": ...}`, joined with nothing between them; None beside tool calls."""
    name: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """The assistant's calls, `{"type": "function", "function": {"name", "arguments"}}`, passed on as they are."""
    tool_call_id: str | None = None
    """Which call a message of role "tool" answers."""
    reasoning: str | None = None
    """What the assistant thought; templates that take it read `reasoning_content`."""


class ChatTemplate:
    """The compiled chat template of one model.

    The prompt that `render` returns holds the special tokens already: encode it with `add_special_tokens=False`.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        limits: TemplateLimits | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`source` is the template, or several by name: "tool_use" is taken for requests with tools, else "default".

        `special_tokens` are `TextTokenizer.special_tokens`; `now` is what `strftime_now` shows.
        Raises `ChatTemplateError`.
        """
        sources = {"default": source} if isinstance(source, str) else source
        if not sources.get("default"):
            raise ChatTemplateError("the model has no default chat template")
        self._special_tokens = dict(special_tokens)
        self._environment = TemplateEnvironment(limits or TemplateLimits(), now)
        self._templates = {name: self._compile(name, text) for name, text in sources.items()}
        with_tools = sources.get("tool_use", sources["default"])
        self.takes_tools: bool = "tools" in _variables(self._environment, with_tools)
        """Whether the template does anything with tools."""

    @classmethod
    def from_folder(
        cls, folder: Path | str, special_tokens: Mapping[str, str], *, limits: TemplateLimits | None = None
    ) -> "ChatTemplate":
        """Reads chat_template.jinja and additional_chat_templates/, else `chat_template` of tokenizer_config.json."""
        sources = _template_files(Path(folder)) or _template_from_config(Path(folder))
        if not sources:
            raise ChatTemplateError(f"{folder} has no chat template: send text or token ids instead of messages")
        return cls(sources, special_tokens, limits=limits)

    def render(
        self,
        messages: Sequence[ChatMessage | Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `template_arguments` are further variables ("enable_thinking"); they override special tokens.

        With `continue_final_message` it ends with the last message's content, as transformers does it.
        Raises `InvalidMessagesError` when the request is at fault, `ChatTemplateError` when the template is.
        """
        arguments = dict(template_arguments or {})
        if reserved := RESERVED_ARGUMENTS.intersection(arguments):
            raise InvalidMessagesError(f"template argument {min(reserved)!r} is set by the request's own fields")
        mappings = [_as_mapping(index, message) for index, message in enumerate(messages)]
        if continue_final_message:
            mappings[-1] = mappings[-1] | {"content": f"{mappings[-1].get('content') or ''}{_END_OF_CONTENT} "}
        variables = {
            **self._special_tokens,
            **arguments,
            "messages": mappings,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._templates.get("tool_use") if tools is not None else None
        prompt = self._render(template or self._templates["default"], variables)
        return _until_mark(prompt) if continue_final_message else prompt

    def _compile(self, name: str, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except Exception as error:  # Jinja's own, those of Python's compiler behind it, TypeError for what is no text
            raise ChatTemplateError(f"chat template {name!r} cannot be compiled: {error}") from error

    def _render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        try:
            return self._environment.render_bounded(template, variables)
        except RefusedByTemplateError as error:
            raise InvalidMessagesError(f"the model's chat template refuses the messages: {error}") from error
        except LimitExceededError as error:
            raise ChatTemplateError(f"chat template stopped: {error}") from error
        except Exception as error:  # a template can raise whatever Python can
            raise ChatTemplateError(f"chat template failed: {type(error).__name__}: {error}") from error


def _variables(environment: jinja2.Environment, source: str) -> set[str]:
    """The names that a template reads."""
    return {name.name for name in environment.parse(source).find_all(nodes.Name) if name.ctx == "load"}


def _until_mark(prompt: str) -> str:
    if (end := prompt.rfind(_END_OF_CONTENT)) < 0:
        raise InvalidMessagesError("the last message can't be continued: its content is not in the prompt")
    # Without the space behind the mark the template trims its messages, so it would have trimmed this one.
    trims = not prompt.startswith(f"{_END_OF_CONTENT} ", end)
    return prompt[:end].rstrip() if trims else prompt[:end]


def _as_mapping(index: int, message: ChatMessage | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(message, ChatMessage):
        fields = {
            "name": message.name,
            "tool_calls": list(message.tool_calls),
            "tool_call_id": message.tool_call_id,
            "reasoning_content": message.reasoning,
        }
        content = _text(index, message.content)
        return {"role": message.role, "content": content} | {key: value for key, value in fields.items() if value}
    if not isinstance(message.get("role"), str):
        raise InvalidMessagesError(f"messages[{index}].role is missing")
    if "content" not in message:
        return dict(message)
    return {**message, "content": _text(index, message["content"])}


def _text(index: int, content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidMessagesError(f"messages[{index}].content is neither text nor a list of parts")
    parts = cast("Sequence[object]", content)
    return "".join(_part_text(f"messages[{index}].content[{position}]", part) for position, part in enumerate(parts))


def _part_text(where: str, part: object) -> str:
    if not isinstance(part, Mapping):
        raise InvalidMessagesError(f"{where} is no content part")
    fields = cast("Mapping[str, object]", part)
    if fields.get("type") != "text":
        raise InvalidMessagesError(f"{where}: parts of type {fields.get('type')!r} are not supported, only 'text'")
    text = fields.get("text")
    if not isinstance(text, str):
        raise InvalidMessagesError(f"{where}.text is missing")
    return text


def _template_files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    default = folder / "chat_template.jinja"
    if default.is_file():
        files["default"] = default
    try:
        return {name: path.read_text("utf-8") for name, path in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"a chat template in {folder} cannot be read: {error}") from error


def _template_from_config(folder: Path) -> dict[str, str]:
    path = folder / "tokenizer_config.json"
    try:
        template = json.loads(path.read_bytes()).get("chat_template")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise ChatTemplateError(f"{path} cannot be read: {error}") from error
    match template:
        case None:
            return {}
        case str():
            return {"default": template}
        case list():
            entries = cast("list[dict[str, str]]", template)
            try:
                return {entry["name"]: entry["template"] for entry in entries}
            except (KeyError, TypeError) as error:
                raise ChatTemplateError(f"{path}: a chat template lacks its name or text") from error
        case _:
            raise ChatTemplateError(f"{path}: chat_template is neither a template nor a list of them")
