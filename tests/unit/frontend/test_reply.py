"""From tokens to what the client reads: parsers see their markers, clients don't; stop strings see all of the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.frontend.parsers.catalog import TOOL_FORMATS
from services.frontend.parsers.reasoning import ThinkParser
from services.frontend.parsers.tool_calls import MarkedCalls
from services.frontend.request.reply import ReplyDelta, ReplyFormat
from services.frontend.text import TextTokenizer
from services.requests import TokenLogprob, TopLogprob

SPECIAL = ["<|python_tag|>", "<|eom_id|>", "<|x|>"]
CALL = '{"name": "f", "parameters": {"a": 1}}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """As Llama 3's, with a token per byte: the marker of calls is a special token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    library.add_special_tokens(SPECIAL)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return TextTokenizer(Path(folder))


def llama(tokenizer: TextTokenizer, *, single: bool = False, stops: tuple[str, ...] = ()) -> ReplyFormat:
    syntax = TOOL_FORMATS["llama3"].syntax
    return ReplyFormat(
        tokenizer,
        stops=stops,
        parser=lambda: MarkedCalls(syntax, {"f"}, single=single),
        markers=(syntax.begin,),
        single=single,
    )


def whole(form: ReplyFormat, ids: Sequence[int]) -> ReplyDelta:
    return form.start().push(ids, last=True)


def test_a_marker_that_is_a_special_token_is_seen_by_the_parser_and_by_nobody_else(tokenizer: TextTokenizer) -> None:
    ids = tokenizer._encode(f"<|x|><|python_tag|>{CALL}<|eom_id|>", False)
    delta = whole(llama(tokenizer), ids)
    assert delta.text == ""
    assert [(call.name, call.arguments) for call in delta.tool_calls] == [("f", '{"a": 1}')]


def test_without_a_parser_it_is_skipped_like_other_special_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer._encode(f"<|python_tag|>{CALL}<|eom_id|>", False)
    assert whole(ReplyFormat(tokenizer), ids).text == CALL


def test_each_choice_has_a_parser_of_its_own(tokenizer: TextTokenizer) -> None:
    form = llama(tokenizer)
    first, second = form.start(), form.start()
    half, rest = tokenizer._encode(CALL[:20], False), tokenizer._encode(CALL[20:], False)
    assert not first.push(half, last=False).tool_calls
    assert second.push(tokenizer._encode("no", False), last=True).text == "no"
    (call,) = first.push(rest, last=True).tool_calls
    assert (call.index, call.name, call.arguments) == (0, "f", '{"a": 1}')
    assert (first.called, second.called) == (True, False)


def test_stop_strings_match_what_the_model_wrote_also_inside_a_call(tokenizer: TextTokenizer) -> None:
    ids = tokenizer._encode(CALL, False)
    delta = whole(llama(tokenizer, stops=("1}",)), ids)
    assert (delta.ended, delta.stopped) == (True, "1}")
    assert delta.token_count_used == CALL.index("1}") + 2
    (call,) = delta.tool_calls
    assert call.arguments == '{"a": '


def test_one_call_at_most_ends_the_answer_with_the_token_that_completes_it(tokenizer: TextTokenizer) -> None:
    reply = llama(tokenizer, single=True).start()
    delta = reply.push(tokenizer._encode(f"{CALL};{CALL}", False), last=False)
    assert (delta.ended, delta.stopped, delta.token_count_used) == (True, None, len(CALL))
    (call,) = delta.tool_calls
    assert call.arguments == '{"a": 1}'


def test_what_a_parser_holds_back_comes_with_the_last_token(tokenizer: TextTokenizer) -> None:
    form = ReplyFormat(tokenizer, parser=lambda: ThinkParser(inside=True))
    reply = form.start()
    assert reply.push(tokenizer._encode("a</thin", False), last=False).reasoning == "a"
    assert reply.push([], last=True).reasoning == "</thin"


def test_log_probabilities_get_the_bytes_of_their_tokens(tokenizer: TextTokenizer) -> None:
    (tag,) = tokenizer._encode("<|x|>", False)
    first, second = tokenizer._encode("é", False)
    reply = ReplyFormat(tokenizer).start()
    given = [TokenLogprob(first, -0.5, (TopLogprob(second, -1.0), TopLogprob(tag, -2.0)))]
    expected = TokenLogprob(first, -0.5, (TopLogprob(second, -1.0, b"\xa9"), TopLogprob(tag, -2.0, b"<|x|>")), b"\xc3")
    assert reply.with_bytes(given) == [expected]
