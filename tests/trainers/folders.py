"""A GGUF file of `testing.tiny` as the folder that other libraries read: config.json, safetensors, a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def as_folder(path: Path, folder: Path) -> Path:
    """The folder, where now lies the same Llama as in that file."""
    folder.mkdir(parents=True)
    read = gguf.GGUFReader(path)

    def told(name: str) -> Any:
        return read.fields[name].contents()

    heads, kv_heads = int(told("llama.attention.head_count")), int(told("llama.attention.head_count_kv"))
    tensors = {}
    for tensor in read.tensors:
        numbers = np.array(tensor.data)
        if "attn_q" in tensor.name:
            numbers = _halves(numbers, heads)
        elif "attn_k" in tensor.name:
            numbers = _halves(numbers, kv_heads)
        tensors[_name(tensor.name)] = numbers
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": told("llama.embedding_length"),
        "intermediate_size": told("llama.feed_forward_length"),
        "num_hidden_layers": told("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": told("llama.context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": told("llama.rope.freq_base"),
        "vocab_size": told("llama.vocab_size"),
        "bos_token_id": told("tokenizer.ggml.bos_token_id"),
        "eos_token_id": told("tokenizer.ggml.eos_token_id"),
        "pad_token_id": told("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=float))
    _write_tokenizer(folder, told)
    return folder


def _name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.weight"


def _halves(numbers: np.ndarray, heads: int) -> np.ndarray:
    """Rows that llama.cpp has side by side, in two halves of a head."""
    rows, columns = numbers.shape
    return np.ascontiguousarray(
        numbers.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _write_tokenizer(folder: Path, told: Any) -> None:
    tokens, kinds = told("tokenizer.ggml.tokens"), told("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in told("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {kind: tokens[int(told(f"tokenizer.ggml.{kind}_token_id"))] for kind in ("bos", "eos", "padding")}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "pad_token": names["padding"],
        "chat_template": told("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
