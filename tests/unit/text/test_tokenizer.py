"""What is promised: transformers' ids, an event loop that goes on, and a clear word about a bad folder."""

import asyncio
import functools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from services.frontend.text import InvalidTextError, TextTokenizer, TokenizerError
from tests.unit.text.conftest import MakeTokenizer, llama_style_tokenizer

TEXTS = [
    "Hello, world!",
    "",
    " leading",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>x</s>",
    "日本語 😀 e\u0301\t\n\n",
    "a  b   c",
]


@functools.cache
def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS)
async def test_ids_and_text_are_those_of_transformers(
    smollm2: TextTokenizer, tokenizer_dir: Path, text: str, add_special_tokens: bool
) -> None:
    expected = reference(tokenizer_dir)
    ids = await smollm2.encode(text, add_special_tokens=add_special_tokens)
    assert ids == expected.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert smollm2.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True},
        {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "<turn>"},
        {"eos_token": "<tool>", "additional_special_tokens": ["<one>", "<two>"]},
        {"eos_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}},
        {"eos_token": "</s>", "pad_token": None, "unk_token": "<unk>"},
    ],
)
async def test_special_tokens_are_those_of_transformers(tmp_path: Path, config: dict[str, object]) -> None:
    """Also those that only the configuration names; bos comes from the post-processor alone."""
    llama_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected, tokenizer = reference(tmp_path), TextTokenizer(tmp_path)

    text = "a <tool> b <turn> c<one><two><image></s>"
    for add_special_tokens in (True, False):
        ids = await tokenizer.encode(text, add_special_tokens=add_special_tokens)
        assert ids == expected.encode(text, add_special_tokens=add_special_tokens)
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    assert tokenizer.special_tokens == expected.special_tokens_map
    assert tokenizer.vocab_size == len(expected)
    assert tokenizer.eos_token_ids == {expected.eos_token_id}


async def test_the_older_special_tokens_file_is_read(tmp_path: Path) -> None:
    llama_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    assert TextTokenizer(tmp_path).special_tokens == {"eos_token": "</s>"}


def test_end_tokens_come_from_the_generation_config_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_dir / name, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 17]}')
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.eos_token_ids == {0, 17, tokenizer.token_id("<|im_end|>")}
    assert tokenizer.special_token_ids >= {0, 1, 2}


@pytest.mark.parametrize("declared", ["[[1]]", '"</s>"', "[1.5]", "true", '[{"id": 1}]'])
def test_an_end_token_that_is_no_id_is_named(tmp_path: Path, declared: str) -> None:
    llama_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {declared}}}')
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id"):
        TextTokenizer(tmp_path)


def test_the_longest_token_may_be_an_added_one(make_tokenizer: MakeTokenizer) -> None:
    assert make_tokenizer(llama_style_tokenizer()).longest_token == len("<0x00>")
    assert make_tokenizer(llama_style_tokenizer(), eos_token="<|end of the turn|>").longest_token == 19


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.one_of(st.text(), st.sampled_from([*TEXTS, "日本 x", "<tool>", "    "]))).map("".join))
def test_no_token_holds_more_characters_than_the_longest(
    smollm2: TextTokenizer, byte_level: TextTokenizer, llama_style: TextTokenizer, text: str
) -> None:
    # SmolLM2's vocabulary has not all bytes: some control characters become no token at all.
    printable = "".join(character for character in text if character.isprintable() or character in "\n\t")
    for tokenizer, encoded in ((smollm2, printable), (byte_level, text), (llama_style, text)):
        assert len(encoded) <= len(tokenizer._encode(encoded, False)) * tokenizer.longest_token


def test_truncation_and_padding_of_the_file_are_not_applied(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = llama_style_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    loaded = make_tokenizer(tokenizer)
    assert len(loaded._encode("abcdefgh", False)) > 4
    assert len(loaded._encode("a", False)) < 4


@pytest.mark.peers(10)
async def test_the_event_loop_goes_on_while_a_long_prompt_is_encoded(smollm2: TextTokenizer) -> None:
    text = " ".join(f"disaggregated{number} serving" for number in range(50_000))
    start = time.perf_counter()
    expected = smollm2._tokenizer.encode(text, add_special_tokens=False)
    blocking = time.perf_counter() - start

    encoding = asyncio.create_task(smollm2.encode(text, add_special_tokens=False))
    worst = 0.0
    while not encoding.done():
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - start)

    assert await encoding == expected.ids
    assert worst < blocking / 4


async def test_a_caller_who_cancels_does_not_wait(tokenizer_dir: Path) -> None:
    tokenizer = TextTokenizer(tokenizer_dir, threads=1)
    text = "disaggregated serving " * 200_000
    running, queued = (asyncio.create_task(tokenizer.encode(text, add_special_tokens=False)) for _ in range(2))
    await asyncio.sleep(0.01)

    start = time.perf_counter()
    running.cancel()
    queued.cancel()
    results = await asyncio.gather(running, queued, return_exceptions=True)
    cancelling = time.perf_counter() - start
    start = time.perf_counter()
    assert await tokenizer.encode("hi", add_special_tokens=False)  # waits for the one in work, not for the queued one
    waiting = time.perf_counter() - start

    assert [type(result) for result in results] == [asyncio.CancelledError] * 2
    assert cancelling < waiting / 2
    tokenizer.close()


async def test_a_lone_surrogate_is_bad_input(smollm2: TextTokenizer) -> None:
    with pytest.raises(InvalidTextError, match="surrogate"):
        await smollm2.encode("a\ud800b", add_special_tokens=False)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_corrupt_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    llama_style_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        TextTokenizer(tmp_path)


def test_the_package_brings_no_engine_and_no_model_library() -> None:
    code = "import sys, services.frontend.text; print({'torch', 'transformers', 'sglang'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("at_most", [3, 4, 5, 8, 9, 1000])
async def test_truncation_is_that_of_transformers(tmp_path: Path, at_most: int) -> None:
    """The text loses its end, and the special tokens around it stay."""
    library = llama_style_tokenizer()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    transformers = pytest.importorskip("transformers")
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    encoded = await tokenizer.encode_all(TEXTS, at_most=at_most)
    tokenizer.close()
    whole = expected(TEXTS).input_ids
    assert [each.token_ids for each in encoded] == expected(TEXTS, truncation=True, max_length=at_most).input_ids
    assert [each.truncated for each in encoded] == [len(ids) > at_most for ids in whole]
    assert any(each.truncated for each in encoded) == (at_most < 1000)
