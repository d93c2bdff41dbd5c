"""A LoRA as GGUF does in llama.cpp what the same LoRA does when it is added to the weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from apprentice import plugins, weights
from apprentice.models._local import Local
from apprentice.testing.tiny import write_tiny
from apprentice.testing.trainers import TASK, THINGS
from apprentice.trainers._adapters import lora_to_gguf

CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 128}
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
RANK, ALPHA = 4, 8
SERVING = {"threads": 1, "context": 512, "max_tokens": 24, "parallel": 1}


def write_adapter(folder: Path, **changes: object) -> dict[str, np.ndarray]:
    """A PEFT folder with random numbers, which are returned."""
    dice = np.random.default_rng(0)
    tensors = {}
    for layer in range(4):
        for module, rows in ROWS.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = dice.normal(size=(RANK, 128)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = dice.normal(0, 0.1, size=(rows, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA} | changes))
    return tensors


def read(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def rotated_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: within a head, number i of its first half, then number i of its second half."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def test_names_numbers_and_the_order_of_rows_are_those_of_llama_cpp(tmp_path: Path) -> None:
    given = write_adapter(tmp_path / "peft")
    lora_to_gguf(tmp_path / "peft", CONFIG, tmp_path / "adapter.gguf")
    found = read(tmp_path / "adapter.gguf")
    assert len(found) == len(given) == 32
    for module, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 0), ("o_proj", 0)):
        name = f"base_model.model.model.layers.2.self_attn.{module}"
        ours = f"blk.2.{NAMES[module]}.weight"
        b = given[f"{name}.lora_B.weight"]
        assert np.array_equal(found[f"{ours}.lora_a"], given[f"{name}.lora_A.weight"])
        assert np.array_equal(found[f"{ours}.lora_b"], rotated_together(b, heads) if heads else b)
    contents = weights.check(tmp_path / "adapter.gguf", expected=weights.Expected(kind="adapter", rank=RANK))
    assert (contents.architecture, contents.tensors) == ("llama", 32)
    told = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    assert told["adapter.lora.alpha"].contents() == ALPHA


async def test_llama_cpp_answers_with_it_as_with_the_weights_to_which_it_was_added(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base.gguf")
    given = write_adapter(tmp_path / "peft")
    lora_to_gguf(tmp_path / "peft", CONFIG, tmp_path / "adapter.gguf")
    merged = tmp_path / "merged.gguf"
    merged.write_bytes(base.read_bytes())
    reader = gguf.GGUFReader(merged, "r+")
    for tensor in reader.tensors:
        for module, name in NAMES.items():
            _, layer, rest = (*tensor.name.split(".", 2), "")[:3]
            if rest == f"{name}.weight":
                full = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                b = given[f"{full}.lora_B.weight"]
                heads = {"q_proj": 4, "k_proj": 2}.get(module)
                b = rotated_together(b, heads) if heads else b
                tensor.data[:] += ALPHA / RANK * (b @ given[f"{full}.lora_A.weight"])
    reader.data.flush()
    asked = [{"text": f"look at the {thing}"} for things in THINGS.values() for thing in things]
    said = {}
    for name, model, adapter in (("bare", base, None), ("adapter", base, "adapter.gguf"), ("merged", merged, None)):
        served: Local = plugins.build("models", "llama_cpp", model=str(model), **SERVING)
        if adapter is not None:
            served._speaker._adapter = tmp_path / adapter  # type: ignore[attr-defined]
        await served.ready(120, patient=False)
        answers = [await served.answer(TASK, given) for given in asked]
        said[name] = [(answer.output, answer.confidence) for answer in answers]
        await served.close()
    assert [output for output, _ in said["adapter"]] == [output for output, _ in said["merged"]]
    sure = zip(said["adapter"], said["merged"], strict=True)
    assert max(abs((one or 0) - (other or 0)) for (_, one), (_, other) in sure) < 1e-3
    assert said["adapter"] != said["bare"]


@pytest.mark.parametrize(
    ("config", "changes", "problem"),
    [
        ({"model_type": "bloom"}, {}, "bloom"),
        ({}, {"use_dora": True}, "DoRA"),
        ({}, {"modules_to_save": ["lm_head"]}, "whole modules"),
    ],
)
def test_what_gguf_cannot_say_is_refused(
    tmp_path: Path, config: dict[str, object], changes: dict[str, object], problem: str
) -> None:
    write_adapter(tmp_path / "peft", **changes)
    with pytest.raises(ValueError, match=problem):
        lora_to_gguf(tmp_path / "peft", CONFIG | config, tmp_path / "adapter.gguf")


def test_the_scale_of_rslora_is_told_as_an_alpha(tmp_path: Path) -> None:
    write_adapter(tmp_path / "peft", use_rslora=True)
    lora_to_gguf(tmp_path / "peft", CONFIG, tmp_path / "adapter.gguf")
    told = gguf.GGUFReader(tmp_path / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    assert told / RANK == pytest.approx(ALPHA / RANK**0.5)
