"""A chat with tools: what is refused, by which field, what the template is told, and which grammar holds the answer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvbaton.errors import RequestError, invalid
from kvbaton.v1 import generate_pb2, worker_pb2
from kvbaton.v1.generate_pb2 import ChatInput, ChatMessage, GenerateRequest, SamplingParams, Tool, ToolCall, ToolChoice
from services.frontend.request.chat import MAX_JSON_DEPTH, MAX_MESSAGES, MAX_TEMPLATE_ARGUMENTS_BYTES, MAX_TOOLS
from services.frontend.request.prepare import PreparedRequest, prepare
from services.frontend.text import ChatTemplate, TextTokenizer
from services.frontend.text_models import TextModel
from services.requests import GrammarKind, Limits

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.x }}){% endfor %}"
    "{{ m.reasoning_content or '' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined %}<think>\n{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
    "{% endif %}"
)
PARAMETERS = '{"type": "object", "properties": {"x": {"type": "integer"}}}'
TOOLS = [Tool(name="f", description="Does f.", parameters=PARAMETERS), Tool(name="g")]
REQUIRED = ToolChoice(mode=generate_pb2.TOOL_CHOICE_MODE_REQUIRED)
USER = ChatMessage(role="user", content="hi")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """One token per byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return TextTokenizer(folder)


class Model:
    """One model's worker, and requests to it."""

    def __init__(self, tokenizer: TextTokenizer, *, template: str = TEMPLATE, **runtime: str) -> None:
        self.tokenizer = tokenizer
        self._worker: Any = SimpleNamespace(
            text=TextModel(tokenizer, ChatTemplate(template, {})),
            model_info=None,
            record=SimpleNamespace(
                model=SimpleNamespace(name="m"),
                runtime=worker_pb2.RuntimeConfig(**runtime),  # pyright: ignore[reportArgumentType]
            ),
        )
        self._limits = Limits(200_000, 200_000, 300, seeded_sampling=True, grammar=bool(runtime.get("grammar_backend")))

    async def prepare(self, *, sampling: SamplingParams | None = None, **chat: Any) -> PreparedRequest:
        chat.setdefault("messages", [USER])
        request = GenerateRequest(chat=ChatInput(**chat), sampling=sampling)
        return await prepare(request, "r", self._worker, self._limits)

    async def prompt(self, **chat: Any) -> str:
        return self.tokenizer.decode((await self.prepare(**chat)).token_ids, skip_special_tokens=False)

    async def refusal(self, **chat: Any) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await self.prepare(**chat)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        return caught.value


@pytest.fixture
def hermes(tokenizer: TextTokenizer) -> Model:
    return Model(tokenizer, tool_call_parser="hermes", grammar_backend="xgrammar")


@pytest.fixture
def qwen3(tokenizer: TextTokenizer) -> Model:
    return Model(tokenizer, tool_call_parser="qwen", reasoning_parser="qwen3", grammar_backend="xgrammar")


# What the template is told.


async def test_tools_are_told_in_openais_form(hermes: Model) -> None:
    f = {"name": "f", "description": "Does f.", "parameters": json.loads(PARAMETERS)}
    g = {"name": "g", "parameters": {"type": "object", "properties": {}}}
    told = "".join(f"[{json.dumps({'type': 'function', 'function': each})}]" for each in (f, g))
    assert await hermes.prompt(tools=TOOLS) == f"{told}<user>hi<assistant>"


async def test_without_a_choice_of_tools_nothing_is_told_and_nothing_looked_for(tokenizer: TextTokenizer) -> None:
    plain = Model(tokenizer)
    none = ToolChoice(mode=generate_pb2.TOOL_CHOICE_MODE_NONE)
    prepared = await plain.prepare(tools=TOOLS, tool_choice=none)
    assert plain.tokenizer.decode(prepared.token_ids, skip_special_tokens=False) == "<user>hi<assistant>"
    assert prepared.text is not None
    assert prepared.text.parser is None


async def test_past_calls_have_arguments_as_objects_and_reasoning_comes_along(hermes: Model) -> None:
    messages = [
        USER,
        ChatMessage(role="assistant", tool_calls=[ToolCall(id="1", name="f", arguments='{"x": 7}')], reasoning="hm"),
        ChatMessage(role="assistant", tool_calls=[ToolCall(id="2", name="g")]),
        ChatMessage(role="tool", content="ok", tool_call_id="1"),
    ]
    expected = "<user>hi<assistant>(f 7)hm<assistant>(g )<tool>ok<assistant>"
    assert await hermes.prompt(messages=messages) == expected


async def test_template_arguments_reach_the_template(hermes: Model) -> None:
    assert (await hermes.prompt(template_arguments='{"enable_thinking": true}')).endswith("<think>\n")


# What is refused.


def nested(depth: int) -> str:
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


def tool_list(count: int) -> list[Tool]:
    return [Tool(name=f"t{index}") for index in range(count)]


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        ({"tools": [Tool(name="f"), Tool(name="a b")]}, "chat.tools[1].name"),
        ({"tools": [Tool(name="")]}, "chat.tools[0].name"),
        ({"tools": [Tool(name="x" * 65)]}, "chat.tools[0].name"),
        ({"tools": [Tool(name="f"), Tool(name="f")]}, "chat.tools[1].name"),
        ({"tools": [Tool(name="f", parameters="[]")]}, "chat.tools[0].parameters"),
        ({"tools": [Tool(name="f", parameters="{")]}, "chat.tools[0].parameters"),
        ({"tools": [Tool(name="f", parameters='{"a": NaN}')]}, "chat.tools[0].parameters"),
        ({"tools": [Tool(name="f", parameters='{"a":' * 100_000)]}, "chat.tools[0].parameters"),
        ({"tools": [Tool(name="f", parameters=nested(MAX_JSON_DEPTH + 1))]}, "chat.tools[0].parameters"),
        ({"tools": tool_list(MAX_TOOLS + 1)}, "chat.tools"),
        ({"tools": [Tool(name="f", description="x" * 2**20)]}, "chat.tools"),
        ({"tool_choice": ToolChoice(mode=generate_pb2.TOOL_CHOICE_MODE_AUTO)}, "chat.tool_choice"),
        ({"tool_choice": REQUIRED}, "chat.tool_choice"),
        ({"tool_choice": ToolChoice(function="f")}, "chat.tool_choice"),
        ({"tools": TOOLS, "tool_choice": ToolChoice(function="h")}, "chat.tool_choice.function"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "chat.messages"),
        ({"messages": [USER, ChatMessage(role="tool", content="x")]}, "chat.messages[1].tool_call_id"),
        ({"messages": [ChatMessage(role="user", tool_calls=[ToolCall(name="f")])]}, "chat.messages[0].tool_calls"),
        (
            {"messages": [ChatMessage(role="assistant", tool_calls=[ToolCall(id="1")])]},
            "chat.messages[0].tool_calls[0].name",
        ),
        (
            {"messages": [ChatMessage(role="assistant", tool_calls=[ToolCall(name="f", arguments="[1]")])]},
            "chat.messages[0].tool_calls[0].arguments",
        ),
        (
            {"messages": [USER, ChatMessage(role="assistant", tool_calls=[ToolCall(name="f", arguments="{x}")])]},
            "chat.messages[1].tool_calls[0].arguments",
        ),
        ({"template_arguments": "[]"}, "chat.template_arguments"),
        ({"template_arguments": "{"}, "chat.template_arguments"),
        ({"template_arguments": '{"tools": []}'}, "chat.template_arguments"),
        (
            {"template_arguments": json.dumps({"a": "x" * MAX_TEMPLATE_ARGUMENTS_BYTES})},
            "chat.template_arguments",
        ),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(hermes: Model, chat: dict[str, Any], field: str) -> None:
    assert (await hermes.refusal(**chat)).field == field


async def test_a_choice_that_this_version_does_not_know_is_refused(hermes: Model) -> None:
    choice = ToolChoice.FromString(b"\x08\x63")
    assert (await hermes.refusal(tools=TOOLS, tool_choice=choice)).field == "chat.tool_choice"


async def test_as_many_tools_as_openai_takes_and_as_deep_as_python_can_write_again(hermes: Model) -> None:
    await hermes.prepare(tools=tool_list(MAX_TOOLS))
    deepest = [Tool(name="f", parameters=nested(MAX_JSON_DEPTH))]
    await hermes.prepare(tools=deepest, tool_choice=REQUIRED, template_arguments=nested(MAX_JSON_DEPTH))


@pytest.mark.parametrize(("parser", "named"), [("", "missing"), ("deepseekv3", "'deepseekv3'")])
async def test_tools_without_a_parser_are_refused_by_its_name(
    tokenizer: TextTokenizer, parser: str, named: str
) -> None:
    error = await Model(tokenizer, tool_call_parser=parser).refusal(tools=TOOLS)
    assert error.field == "chat.tools"
    assert named in error.message
    assert "hermes, llama3, qwen, qwen25" in error.message


async def test_tools_that_the_template_would_not_tell_are_refused(tokenizer: TextTokenizer) -> None:
    model = Model(tokenizer, template="{{ messages[0].content }}", tool_call_parser="hermes")
    assert (await model.refusal(tools=TOOLS)).field == "chat.tools"


async def test_a_reasoning_parser_that_is_not_here_leaves_text_as_it_is_unless_it_is_asked_for(
    tokenizer: TextTokenizer,
) -> None:
    model = Model(tokenizer, reasoning_parser="gpt-oss")
    prepared = await model.prepare()
    assert prepared.text is not None
    assert prepared.text.parser is None
    error = await model.refusal(separate_reasoning=True)
    assert error.field == "chat.separate_reasoning"
    assert "'gpt-oss'" in error.message
    assert "qwen3" in error.message


async def test_a_model_that_does_not_reason_may_be_asked_to_separate_it(hermes: Model) -> None:
    await hermes.prepare(separate_reasoning=True)


# What holds the answer.


async def test_a_required_call_is_a_grammar(hermes: Model) -> None:
    prepared = await hermes.prepare(tools=TOOLS, tool_choice=REQUIRED)
    assert prepared.sampling.grammar is not None
    assert prepared.sampling.grammar.kind is GrammarKind.JSON_SCHEMA
    schema = json.loads(prepared.sampling.grammar.source)
    assert (schema["minItems"], schema.get("maxItems")) == (1, None)
    assert [each["properties"]["name"]["enum"] for each in schema["items"]["anyOf"]] == [["f"], ["g"]]


async def test_a_named_function_is_called_once(hermes: Model) -> None:
    prepared = await hermes.prepare(tools=TOOLS, tool_choice=ToolChoice(function="g"))
    assert prepared.sampling.grammar is not None
    schema = json.loads(prepared.sampling.grammar.source)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert [each["properties"]["name"]["enum"] for each in schema["items"]["anyOf"]] == [["g"]]


async def test_required_calls_that_may_not_be_parallel_are_one(hermes: Model) -> None:
    prepared = await hermes.prepare(tools=TOOLS, tool_choice=REQUIRED, parallel_tool_calls=False)
    assert prepared.sampling.grammar is not None
    assert json.loads(prepared.sampling.grammar.source)["maxItems"] == 1


async def test_one_strict_tool_makes_a_structural_tag_and_others_stay_free(hermes: Model) -> None:
    tools = [Tool(name="f", parameters=PARAMETERS, strict=True), Tool(name="g", parameters=PARAMETERS)]
    prepared = await hermes.prepare(tools=tools)
    assert prepared.sampling.grammar is not None
    assert prepared.sampling.grammar.kind is GrammarKind.STRUCTURAL_TAG
    tag = json.loads(prepared.sampling.grammar.source)
    assert tag["triggers"] == ["<tool_call>"]
    assert [each["schema"] for each in tag["structures"]] == [json.loads(PARAMETERS), {"type": "object"}]


async def test_tools_that_may_be_called_leave_the_answer_free(hermes: Model) -> None:
    assert (await hermes.prepare(tools=TOOLS)).sampling.grammar is None


STRICT = [Tool(name="g"), Tool(name="f", parameters=PARAMETERS, strict=True)]


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        ({"tools": TOOLS, "tool_choice": REQUIRED}, "chat.tool_choice"),
        ({"tools": TOOLS, "tool_choice": ToolChoice(function="f")}, "chat.tool_choice"),
        ({"tools": STRICT}, "chat.tools[1].strict"),
    ],
)
async def test_what_needs_a_grammar_is_refused_where_it_can_not_be_had(
    tokenizer: TextTokenizer, hermes: Model, chat: dict[str, Any], field: str
) -> None:
    without = await Model(tokenizer, tool_call_parser="hermes").refusal(**chat)
    assert without.field == field
    assert "no grammar backend" in without.message
    taken = await hermes.refusal(sampling=SamplingParams(regex="a"), **chat)
    assert taken.field == field
    assert "grammar of its own" in taken.message


async def test_a_grammar_that_is_too_large_is_the_tools_fault(hermes: Model) -> None:
    tools = [Tool(name=f"t{i}", parameters=json.dumps({"title": "x" * 1000})) for i in range(100)]
    assert (await hermes.refusal(tools=tools, tool_choice=REQUIRED)).field == "chat.tool_choice"
    await hermes.prepare(tools=tools)


async def test_schemas_that_contradict_each_other_are_refused(hermes: Model) -> None:
    tools = [
        Tool(name=f"t{kind}", parameters=json.dumps({"$defs": {"a": {"type": kind}}})) for kind in ("null", "array")
    ]
    assert (await hermes.refusal(tools=tools, tool_choice=REQUIRED)).field == "chat.tools"


# Reasoning and grammars.

ANSWER = SamplingParams(json_schema='{"type": "integer"}')


@pytest.mark.parametrize(
    ("arguments", "begin"),
    [("", "<think>"), ('{"enable_thinking": true}', ""), ('{"enable_thinking": false}', None)],
)
async def test_a_grammar_begins_behind_the_reasoning(qwen3: Model, arguments: str, begin: str | None) -> None:
    """The rendered prompt says whether reasoning is to come, has begun, or is switched off."""
    grammar = (await qwen3.prepare(sampling=ANSWER, template_arguments=arguments)).sampling.grammar
    assert grammar is not None
    if begin is None:
        assert (grammar.kind, grammar.source) == (GrammarKind.JSON_SCHEMA, ANSWER.json_schema)
        return
    tag = json.loads(grammar.source)["format"]
    thought = (tag if tag["type"] == "sequence" else tag["elements"][0])["elements"][0]
    assert (thought["begin"], thought["end"]) == (begin, "</think>")


async def test_without_separate_reasoning_the_grammar_holds_the_whole_answer(qwen3: Model) -> None:
    grammar = (await qwen3.prepare(sampling=ANSWER, separate_reasoning=False)).sampling.grammar
    assert grammar is not None
    assert grammar.source == ANSWER.json_schema


async def test_what_a_worker_says_of_the_grammar_names_what_the_client_sent(hermes: Model, qwen3: Model) -> None:
    tools: Any = [Tool(name="f")]
    strict: Any = [Tool(name="f", strict=True)]
    refused = invalid("sampling.structural_tag", "too complex")
    for prepared, field in [
        (await qwen3.prepare(sampling=ANSWER), "sampling.json_schema"),
        (await qwen3.prepare(tools=tools, tool_choice=REQUIRED), "chat.tool_choice"),
        (await hermes.prepare(tools=strict), "chat.tools"),
        (await hermes.prepare(), "sampling.structural_tag"),
    ]:
        error = prepared.as_sent(refused)
        assert (error.field, error.message) == (field, f"{field}: too complex")
        assert prepared.as_sent(invalid("sampling.stop", "no")).field == "sampling.stop"


async def test_a_structural_tag_is_not_touched(qwen3: Model) -> None:
    own = '{"type": "structural_tag", "format": {"type": "any_text"}}'
    grammar = (await qwen3.prepare(sampling=SamplingParams(structural_tag=own))).sampling.grammar
    assert grammar is not None
    assert grammar.source == own


@pytest.mark.parametrize("backend", ["llguidance", "outlines"])
async def test_a_backend_that_knows_no_sequences_is_named(tokenizer: TextTokenizer, backend: str) -> None:
    model = Model(tokenizer, tool_call_parser="qwen", reasoning_parser="qwen3", grammar_backend=backend)
    own = await model.refusal(sampling=ANSWER)
    assert own.field == "sampling.json_schema"
    assert backend in own.message
    assert (await model.refusal(tools=TOOLS, tool_choice=REQUIRED)).field == "chat.tool_choice"
    await model.prepare(sampling=ANSWER, template_arguments='{"enable_thinking": false}')


@pytest.mark.parametrize(
    ("parser", "chat", "reasoning", "content"),
    [
        ("qwen3", {}, "", "a"),
        ("qwen3", {"template_arguments": '{"enable_thinking": true}'}, "a", ""),
        ("qwen3", {"template_arguments": '{"enable_thinking": false}'}, "", "a"),
        ("deepseek-r1", {}, "a", ""),
        ("deepseek-r1", {"template_arguments": '{"enable_thinking": false}'}, "", "a"),
        ("deepseek-r1", {"separate_reasoning": False}, "", "a"),
        (
            "qwen3",
            {"messages": [ChatMessage(role="assistant", content="<think>b")], "continue_final_message": True},
            "a",
            "",
        ),
        (
            "deepseek-r1",
            {"messages": [ChatMessage(role="assistant", content="<think>b</think>c")], "continue_final_message": True},
            "",
            "a",
        ),
        # What goes on is content: the reasoning, if there was any, isn't part of it.
        (
            "deepseek-r1",
            {"messages": [ChatMessage(role="assistant", content="b")], "continue_final_message": True},
            "",
            "a",
        ),
    ],
)
async def test_where_the_answer_begins(
    tokenizer: TextTokenizer, parser: str, chat: dict[str, Any], reasoning: str, content: str
) -> None:
    prepared = await Model(tokenizer, reasoning_parser=parser).prepare(**chat)
    assert prepared.text is not None
    delta = prepared.text.start().push(tokenizer._encode("a", False), last=True)
    assert (delta.reasoning, delta.text) == (reasoning, content)


@pytest.mark.parametrize("parser", ["deepseek-r1", "qwen3"])
async def test_a_grammar_holds_an_answer_that_goes_on_from_its_first_token(
    tokenizer: TextTokenizer, parser: str
) -> None:
    model = Model(tokenizer, reasoning_parser=parser, grammar_backend="xgrammar")
    messages = [USER, ChatMessage(role="assistant", content="The answer is")]
    prepared = await model.prepare(messages=messages, continue_final_message=True, sampling=ANSWER)
    assert prepared.sampling.grammar is not None
    assert (prepared.sampling.grammar.kind, prepared.sampling.grammar.source) == (
        GrammarKind.JSON_SCHEMA,
        ANSWER.json_schema,
    )


async def test_a_least_length_contradicts_the_tools_grammar(hermes: Model) -> None:
    error = await hermes.refusal(tools=TOOLS, tool_choice=REQUIRED, sampling=SamplingParams(min_new_tokens=3))
    assert error.field == "sampling.min_new_tokens"


async def test_prompts_that_are_no_chat_are_never_parsed(tokenizer: TextTokenizer) -> None:
    model = Model(tokenizer, reasoning_parser="deepseek-r1", tool_call_parser="hermes")
    prepared = await prepare(GenerateRequest(text="hi"), "r", model._worker, model._limits)
    assert prepared.text is not None
    assert prepared.text.parser is None
