"""A tokenizer for a model of dummy weights: token 17 is the word " w17", so that every token is text."""

from __future__ import annotations

import json
from pathlib import Path


def write_words(folder: Path, vocabulary: int) -> None:
    """tokenizer.json and its configuration, as byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # In byte-level BPE a space is written as this letter.
    words = {f"\u0120w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
