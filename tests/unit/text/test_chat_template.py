"""What is promised: transformers' prompts, errors that tell whose fault it was, and an end to every template."""

import json
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.frontend.text import (
    ChatMessage,
    ChatTemplate,
    ChatTemplateError,
    InvalidMessagesError,
    TemplateLimits,
    TextTokenizer,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Hi \N{GRINNING FACE}"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "  Bye\n"},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Wetter für <Orte>", "parameters": {"b": 1}}}
]
LLAMA_3 = """\
{%- set loop_messages = messages -%}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
{{- content -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""  # noqa: E501
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set system = false %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system %}{{- '[INST] ' ~ system ~ '\n\n' ~ message['content'] ~ '[/INST]' }}
        {%- else %}{{- '[INST] ' ~ message['content'] ~ '[/INST]' }}{%- endif %}
    {%- else %}{% generation %}{{- ' ' ~ message['content'] ~ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
QWEN = """\
{%- macro turn(role, text) %}{{- '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{%- endmacro %}
{%- set state = namespace(last=-1, seen=[]) %}
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>' ~ (tools | tojson(indent=2)) ~ '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- set state.last = loop.revindex ~ '/' ~ loop.length %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
{%- endfor %}
{{- state.last }}
{%- for message in messages if message.role != 'system' recursive %}
    {{- turn(message.role, message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
        {{- '}</tool_call>' }}
    {%- endfor %}
{%- else %}{{- 'nobody said anything' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
{%- if documents is not none %}{{- 'documents' }}{%- endif %}
{{- strftime_now('%Y') }}
"""
TEMPLATES = {"llama 3": LLAMA_3, "mistral": MISTRAL, "qwen": QWEN}


def transformers_prompt(source: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template([messages], chat_template=source, **SPECIAL, **arguments)
    return rendered[0]


def template(source: str | Mapping[str, str], **limits: Any) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, limits=TemplateLimits(**limits))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_model_folder_renders_as_in_transformers(
    smollm2: TextTokenizer, tokenizer_dir: Path, add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    expected = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    ours = ChatTemplate.from_folder(tokenizer_dir, smollm2.special_tokens)
    for messages in (CONVERSATION, CONVERSATION[1:]):
        prompt = ours.render(messages, add_generation_prompt=add_generation_prompt)
        options = {"add_generation_prompt": add_generation_prompt}
        assert prompt == expected.apply_chat_template(messages, tokenize=False, **options)
        ids = expected.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert smollm2._encode(prompt, False) == ids


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_well_known_templates_render_as_in_transformers(name: str, add_generation_prompt: bool) -> None:
    source, ours = TEMPLATES[name], template(TEMPLATES[name])
    for messages in (CONVERSATION, CONVERSATION[1:]):
        expected = transformers_prompt(source, messages, add_generation_prompt=add_generation_prompt)
        assert ours.render(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("name", ["llama 3", "mistral"])
def test_a_last_message_is_continued_as_in_transformers(name: str) -> None:
    messages = [*CONVERSATION[1:], {"role": "assistant", "content": " The city is called \n"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    prompt = template(TEMPLATES[name]).render(messages, **options)
    assert prompt == transformers_prompt(TEMPLATES[name], messages, **options)
    assert prompt.rstrip().endswith("The city is called")


def test_a_last_message_that_the_template_leaves_out_cannot_be_continued() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(InvalidMessagesError, match="can't be continued"):
        template("{{ messages[0].content }}").render(messages, add_generation_prompt=False, continue_final_message=True)


def test_tools_calls_and_further_arguments_render_as_in_transformers() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "1"},
    ]
    ours = template(QWEN).render(messages, tools=TOOLS, template_arguments={"enable_thinking": False})
    assert ours == transformers_prompt(QWEN, messages, tools=TOOLS, add_generation_prompt=True, enable_thinking=False)
    typed = [
        ChatMessage("user", "Weather?"),
        ChatMessage("assistant", tool_calls=[call]),
        ChatMessage("tool", "12 °C", tool_call_id="1"),
    ]
    assert template(QWEN).render(typed, tools=TOOLS, template_arguments={"enable_thinking": False}) == ours


def test_no_messages_take_the_else_branch() -> None:
    assert "nobody said anything" in template(QWEN).render([])


def test_the_date_is_the_one_given() -> None:
    ours = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2024, 7, 26, tzinfo=UTC))
    assert ours.render([]) == "26 Jul 2024"


def test_text_parts_are_joined() -> None:
    ours = template("{% for m in messages %}{{ m.content }}|{{ m.name }}{% endfor %}")
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert ours.render([ChatMessage("user", parts, name="ann")]) == "one two|ann"
    assert ours.render([{"role": "user", "content": parts}]) == "one two|"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            r"messages\[0\].content\[0\].*image_url",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[0\].content\[0\].text is missing"),
        ({"role": "user", "content": ["x"]}, r"messages\[0\].content\[0\]"),
        ({"role": "user", "content": 3}, r"messages\[0\].content"),
        ({"content": "x"}, r"messages\[0\].role"),
    ],
)
def test_messages_that_are_no_text_are_refused_by_name(message: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidMessagesError, match=complaint):
        template(LLAMA_3).render([message])


def test_messages_that_the_template_refuses_are_the_requests_fault() -> None:
    with pytest.raises(InvalidMessagesError, match="roles must alternate"):
        template(MISTRAL).render([ChatMessage("user", "a"), ChatMessage("user", "b")])


def test_an_argument_that_a_field_sets_is_refused() -> None:
    with pytest.raises(InvalidMessagesError, match="'messages'"):
        template(LLAMA_3).render([], template_arguments={"messages": []})


def test_a_template_with_a_syntax_error_is_refused_when_loaded() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        template("{% for x in %}")


@pytest.mark.parametrize("depth", [25, 2000])
def test_a_template_that_pythons_compiler_refuses_is_refused_when_loaded(depth: int) -> None:
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        template("{% for x in [1] %}" * depth + "x" + "{% endfor %}" * depth)


def test_a_template_that_is_no_text_is_refused_when_loaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default", "template": 3}]}')
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        ChatTemplate.from_folder(tmp_path, {})


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatTemplate.from_folder(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ChatTemplateError, match="chat_template"):
        ChatTemplate.from_folder(tmp_path, {})


def test_named_templates_come_from_config_or_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    from_config = ChatTemplate.from_folder(tmp_path, {})
    assert (from_config.render([]), from_config.render([], tools=TOOLS)) == ("plain", "tools")

    (tmp_path / "chat_template.jinja").write_text("plain file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools file")
    from_files = ChatTemplate.from_folder(tmp_path, {})
    assert (from_files.render([]), from_files.render([], tools=TOOLS)) == ("plain file", "tools file")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{% include 'other' %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ range(1000000) | list }}",
    ],
)
def test_what_the_sandbox_forbids_and_what_fails_is_the_templates_fault(source: str) -> None:
    with pytest.raises(ChatTemplateError) as raised:
        template(source).render([])
    assert not isinstance(raised.value, InvalidMessagesError)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in 'x' * 90000 if b == 'y' %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% for a in range(9999) if n %}{{ m(n - 1) }}{% endfor %}{% endmacro %}{{ m(9) }}",
        "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ 10**(10**10) }}",
        "{{ (10**60)**60 }}",
        "{% set ns = namespace(n=10) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 'x'.ljust(10**12) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match="stopped"):
        template(source, max_steps=200_000, max_chars=1_000_000, max_seconds=5).render([])
    assert time.perf_counter() - start < 10


def test_time_runs_out_too() -> None:
    slow = template("{% for a in range(99999) %}{{ a * a }}{% endfor %}", max_seconds=0.001)
    with pytest.raises(ChatTemplateError, match=r"longer than 0\.001 s"):
        slow.render([])


def test_every_rendering_has_its_own_budget() -> None:
    ours = template("{% for a in range(5000) %}x{% endfor %}", max_steps=6_000)
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(ours.render([]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["x" * 5000] * 4
    assert ours.render([]) == "x" * 5000


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        TemplateLimits(max_steps=0)


def test_reasoning_and_calls_reach_the_template_as_it_expects_them() -> None:
    source = (
        "{% for m in messages %}{{ m.reasoning_content or '-' }}|"
        "{% for c in m.tool_calls or [] %}{{ c.id }}:{{ c.function.arguments.city }}{% endfor %};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    messages = [ChatMessage("user", "hi"), ChatMessage("assistant", "", tool_calls=[call], reasoning="hm")]
    assert template(source).render(messages) == "-|;hm|1:Rome;"


def test_a_template_that_does_nothing_with_tools_says_so() -> None:
    assert not template("{{ messages[0].content }}").takes_tools
    assert template("{% if tools %}{{ tools | tojson }}{% endif %}").takes_tools
    assert template({"default": "{{ messages }}", "tool_use": "{{ tools }}"}).takes_tools
    assert not template({"default": "{{ tools }}", "tool_use": "{{ messages }}"}).takes_tools, (
        "not the one that is used"
    )
