"""A language model so small that it is trained in seconds: random numbers, and a tokenizer of a thousand tokens.

It knows nothing. What it can be taught shows that a trainer works, not how good its student is.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from apprentice.testing.trainers import TASK, THINGS, examples

_WIDTH, _LAYERS, _HEADS, _KV_HEADS, _INNER, _TOKENS = 128, 4, 4, 2, 256, 1000
_LOUD = 8  # times as large as other weights are the vectors of tokens: or all words look the same to a random network
_START, _END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny(path: Path, *, seed: int = 0, texts: tuple[str, ...] = ()) -> Path:
    """The path, where now lies a Llama of 0.7 million random numbers as a GGUF file of 32 bits, 3 MB.

    Its tokenizer is made from the words of `testing.trainers` and from `texts`. The same seed gives the same numbers.
    """
    tokenizer = _tokenizer(texts)
    dice = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_type("model")
    writer.add_context_length(2048)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(tokenizer.get_vocab_size())
    _write_tokenizer(writer, tokenizer)
    for name, shape in _shapes(tokenizer.get_vocab_size()).items():
        spread = (_LOUD if name == "token_embd.weight" else 1) * shape[-1] ** -0.5
        numbers = dice.normal(0.0, spread, shape) if len(shape) == 2 else np.ones(shape)
        writer.add_tensor(name, numbers.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(tokens: int) -> dict[str, tuple[int, ...]]:
    kv = _WIDTH // _HEADS * _KV_HEADS
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (tokens, _WIDTH), "output_norm.weight": (_WIDTH,)}
    for layer in range(_LAYERS):
        of = {
            "attn_norm": (_WIDTH,),
            "ffn_norm": (_WIDTH,),
            "attn_q": (_WIDTH, _WIDTH),
            "attn_output": (_WIDTH, _WIDTH),
        }
        of |= {"attn_k": (kv, _WIDTH), "attn_v": (kv, _WIDTH), "ffn_down": (_WIDTH, _INNER)}
        of |= {"ffn_gate": (_INNER, _WIDTH), "ffn_up": (_INNER, _WIDTH)}
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in of.items()}
    return found


def _tokenizer(texts: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        special_tokens=["<|endoftext|>", _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    shown = [json.dumps({"text": row.input["text"], **row.target}, separators=(",", ":")) for row in examples()]
    words = [f" {thing}" for things in THINGS.values() for thing in things]
    tokenizer.train_from_iterator([*shown, *words, TASK.description, *texts], trainer)
    return tokenizer


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    told = json.loads(tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    special = {_START, _END, "<|endoftext|>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])  # a control token, or one like any other
    writer.add_token_merges([" ".join(pair) for pair in told["model"]["merges"]])
    writer.add_bos_token_id(tokens.index(_START))
    writer.add_eos_token_id(tokens.index(_END))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(_TEMPLATE)
