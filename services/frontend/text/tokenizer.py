"""Which token ids does a text have, and which text do token ids have: one model's tokenizer, without transformers."""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How tokenizers with byte fallback spell the token of one byte."""


class TokenizerError(Exception):
    """The model folder holds no usable tokenizer, or a token id lies outside what any tokenizer can hold."""


class InvalidTextError(ValueError):
    """The text cannot be tokenized: it holds a lone surrogate, so it is no Unicode text."""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The ids of one text, special tokens included; `truncated` when its end was cut off."""

    token_ids: list[int]
    truncated: bool = False


class TextTokenizer:
    """The tokenizer of one model folder; ids are those of `transformers.AutoTokenizer` on the same folder.

    Read are tokenizer.json (required), tokenizer_config.json, special_tokens_map.json and generation_config.json. Which
    special tokens a prompt is wrapped in is decided by the post-processor in tokenizer.json, as in transformers 5:
    the configuration's `add_bos_token` and `add_eos_token` are not read. `clean_up_tokenization_spaces` is not applied.

    Raises `TokenizerError` when a file is missing or cannot be read as what it should be.
    """

    def __init__(self, folder: Path | str, *, threads: int = 2) -> None:
        """`threads`: how many prompts are encoded at the same time; further ones queue."""
        self._tokenizer = _load_tokenizer(Path(folder))
        self.special_tokens: Mapping[str, str] = _named_special_tokens(Path(folder))
        """The named special tokens as text, for example {"bos_token": "<s>"}: what a chat template is given."""
        _declare_special_tokens(self._tokenizer, Path(folder), self.special_tokens)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        """Ids that `decode` leaves out with `skip_special_tokens`."""
        self.eos_token_ids: frozenset[int] = self._read_eos_token_ids(Path(folder))
        """Ids that end a generation: those of generation_config.json and the tokenizer's own `eos_token`."""
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        """Number of tokens, added tokens included."""
        self.longest_token: int = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=0)
        """Characters of the longest token as the vocabulary spells it, added tokens included.

        No token stands for more characters of a text, except for those that tokenizers drop or lump together: white
        space that they strip, runs of unknown characters.
        """
        self.decoder_config: Mapping[str, Any] = _decoder_config(self._tokenizer)
        """The `decoder` entry of tokenizer.json; empty when there is none."""
        self.piece_caches: dict[frozenset[int], dict[int, bytes]] = {}
        """What detokenizers remember of this tokenizer, by the ids that they hide."""
        self.token_bytes_cache: dict[int, bytes] = {}
        """What `token_bytes` remembers of this tokenizer."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`, computed in a thread; the event loop goes on meanwhile.

        Cancelling returns at once; a text not yet begun is then never encoded, one in work is encoded in vain.
        Raises `InvalidTextError`.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._encode, text, add_special_tokens)

    async def encode_all(self, texts: Sequence[str], *, at_most: int | None = None) -> list[EncodedText]:
        """The ids of every text with its special tokens, computed one after the other in one thread.

        `at_most` cuts the end off a text that has more; the special tokens behind it stay, as in transformers.
        Cancelling returns at once. Raises `InvalidTextError`.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: [self._encode_fitting(text, at_most) for text in texts]
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of `ids`; ids that the vocabulary does not hold have no text. Raises `TokenizerError`."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise TokenizerError("a token id is negative or needs more than 32 bits") from error

    async def decode_in_thread(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """As `decode`; the event loop goes on meanwhile, and cancelling returns at once."""
        loop = asyncio.get_running_loop()
        try:
            # Of the library's calls only the batch ones release the GIL.
            (text,) = await loop.run_in_executor(
                self._executor,
                lambda: self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens),
            )
        except OverflowError as error:
            raise TokenizerError("a token id is negative or needs more than 32 bits") from error
        return text

    async def spell(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it, empty without one, looked up in a thread. Raises `TokenizerError`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: [self.token_text(each) or "" for each in ids])

    def token_text(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("Ġthe", "<0x0A>"), None without one. Raises `TokenizerError`."""
        try:
            return self._tokenizer.id_to_token(token_id)
        except OverflowError as error:
            raise TokenizerError(f"token id {token_id} is negative or needs more than 32 bits") from error

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled as the vocabulary does, None when there is none."""
        return self._tokenizer.token_to_id(token)

    def close(self) -> None:
        """Ends the threads; texts that wait for one fail with `CancelledError`."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the library's calls only the batch ones release the GIL; the fast one leaves out character offsets.
        try:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidTextError("the text holds a lone surrogate and is no Unicode text") from error
        return encoding.ids

    def _encode_fitting(self, text: str, at_most: int | None) -> EncodedText:
        ids = self._encode(text, add_special_tokens=True)
        if at_most is None or len(ids) <= at_most:
            return EncodedText(ids)
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        encoding.truncate(max(0, at_most - self._tokenizer.num_special_tokens_to_add(is_pair=False)))
        return EncodedText(self._tokenizer.post_process(encoding, None, True).ids, truncated=True)

    def _read_eos_token_ids(self, folder: Path) -> frozenset[int]:
        path = folder / "generation_config.json"
        declared = _read_json(path).get("eos_token_id")
        ids = cast("list[object]", declared) if isinstance(declared, list) else [declared]
        eos_token = self.special_tokens.get("eos_token")
        named = self.token_id(eos_token) if eos_token is not None else None
        found = [id for id in (*ids, named) if id is not None]
        if not all(type(id) is int for id in found):
            raise TokenizerError(f"{path}: eos_token_id is neither a token id nor a list of them")
        return frozenset(cast("list[int]", found))


def decoder_steps(config: Mapping[str, Any]) -> set[str]:
    """The types of a decoder and of everything in it."""
    nested: list[Mapping[str, Any]] = config.get("decoders", [])
    return {config.get("type", ""), *(name for step in nested for name in decoder_steps(step))}


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{path} does not exist: only models with a tokenizer.json can be served")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in an optional file, empty when the file does not exist."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds no JSON object")
    return cast("dict[str, Any]", value)


def _special_token_entries(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:  # the newer layout; the older file is then out of date
        return config
    return config | _read_json(folder / "special_tokens_map.json")


def _named_special_tokens(folder: Path) -> dict[str, str]:
    entries = _special_token_entries(folder)
    extra = entries.get("extra_special_tokens")
    if isinstance(extra, dict):
        entries |= cast("dict[str, Any]", extra)
    return {
        name: text for name, value in entries.items() if name.endswith("_token") and (text := _token_content(value))
    }


def _unnamed_special_tokens(folder: Path) -> Iterator[str]:
    entries = _special_token_entries(folder)
    extra = entries.get("extra_special_tokens") or entries.get("additional_special_tokens")
    values = cast("list[object]", extra) if isinstance(extra, list) else []
    yield from (text for value in values if (text := _token_content(value)))


def _token_content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("content")
    return value if isinstance(value, str) else None


def _declare_special_tokens(tokenizer: Tokenizer, folder: Path, named: Mapping[str, str]) -> None:
    """Makes special what only the configuration calls special; tokenizer.json often leaves it out."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    texts = dict.fromkeys([*named.values(), *_unnamed_special_tokens(folder)])
    tokens = [known.get(text) or AddedToken(text, normalized=False, special=True) for text in texts]
    tokenizer.add_special_tokens(tokens)  # pyright: ignore[reportUnknownMemberType]


def _decoder_config(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.decoder is None:
        return {}
    return cast("dict[str, Any]", json.loads(tokenizer.decoder.__getstate__()))
