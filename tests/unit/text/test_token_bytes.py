"""Log probabilities say which bytes each token stands for, be they part of a character."""

from services.frontend.text import IncrementalDetokenizer, TextTokenizer, token_bytes
from tests.unit.text.conftest import ids_of

TEXT = "The fox 日本 naïve 😀\n  indented, \t x"


def test_the_bytes_of_byte_level_tokens_joined_are_the_text(smollm2: TextTokenizer, byte_level: TextTokenizer) -> None:
    for tokenizer in (smollm2, byte_level):
        ids = tokenizer._encode(TEXT, False)
        spell = token_bytes(tokenizer)
        assert b"".join(spell[token_id] for token_id in ids).decode() == TEXT
    assert any(len(spell[token_id]) == 1 and spell[token_id][0] > 127 for token_id in ids), "part of a character"


def test_byte_fallback_tokens_are_single_bytes_and_words_keep_their_space(gemma_style: TextTokenizer) -> None:
    spell = token_bytes(gemma_style)
    tokens = ["▁th", "he", "<0x0A>", "<0xE6>", "日", "▁▁"]
    expected = [b" th", b"he", b"\n", b"\xe6", "日".encode(), b"  "]
    assert [spell[token_id] for token_id in ids_of(gemma_style, tokens)] == expected


def test_a_leading_space_is_kept_that_the_decoder_strips_at_the_start_of_a_text(llama_style: TextTokenizer) -> None:
    (token_id,) = ids_of(llama_style, ["▁th"])
    assert llama_style.decode([token_id], skip_special_tokens=True) == "th"
    assert token_bytes(llama_style)[token_id] == b" th"


def test_special_tokens_are_their_text(any_tokenizer: TextTokenizer) -> None:
    spell = token_bytes(any_tokenizer)
    for token_id in any_tokenizer.special_token_ids:
        assert spell[token_id] == (any_tokenizer.token_text(token_id) or "").encode()


def test_continuation_pieces_and_words_of_wordpiece(wordpiece: TextTokenizer) -> None:
    spell = token_bytes(wordpiece)
    for token_id in range(wordpiece.vocab_size):
        token = wordpiece.token_text(token_id) or ""
        if token_id not in wordpiece.special_token_ids and token.strip("#").isalpha():
            assert spell[token_id].decode() == (token[2:] if token.startswith("##") else f" {token}")


def test_ids_outside_the_vocabulary_are_no_bytes(any_tokenizer: TextTokenizer) -> None:
    assert token_bytes(any_tokenizer)[any_tokenizer.vocab_size + 7] == b""


def test_a_tokens_bytes_are_looked_up_once(any_tokenizer: TextTokenizer) -> None:
    first = token_bytes(any_tokenizer)
    assert first[5] is not None
    assert token_bytes(any_tokenizer) is first


def test_kept_special_tokens_are_text_and_others_are_not(byte_level: TextTokenizer, llama_style: TextTokenizer) -> None:
    for tokenizer in (byte_level, llama_style):
        ids = ids_of(tokenizer, ["<s>", "a", "</s>", "a"])
        keep = frozenset(ids_of(tokenizer, ["<s>"]))
        detokenizer = IncrementalDetokenizer(tokenizer, keep=keep)
        assert detokenizer.push(ids) + detokenizer.finish() in ("<s>aa", "<s> aa")
        plain = IncrementalDetokenizer(tokenizer)
        assert plain.push(ids) + plain.finish() == "aa"
