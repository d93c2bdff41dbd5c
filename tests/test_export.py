"""Versions as folders that other programs serve: what is in them, what they compute, and what is never overwritten."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy

from apprentice import cli, export, plugins, weights
from apprentice.config import load
from apprentice.errors import ConfigError, UnsafeFile
from apprentice.export import Order
from apprentice.models._local import Local
from apprentice.testing import hostile
from apprentice.testing.local_servers import write_checkpoint
from apprentice.testing.models import TASK
from apprentice.testing.trainers import TASK as SORT
from apprentice.testing.trainers import examples
from apprentice.types import Json, Store, Task, Version

from .conftest import YAML
from .models.test_llama_cpp import asks, fields, owned, smollm2, write_adapter

PROBE: list[tuple[Json, Json]] = [({"text": "win a prize"}, {"label": "spam"})]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
RANK, ALPHA = 4, 8.0
WIDTH, OUT = 256, 64
Types = Mapping[str, gguf.GGMLQuantizationType]
T = gguf.GGMLQuantizationType
DICE = np.random.default_rng(7)


# --- GGUF ---------------------------------------------------------------------------------------------------------------


def write_base(path: Path, types: Types, **texts: str) -> Path:
    """A GGUF model of the architecture llama with one tensor of each of these types, and all that `weights` asks for."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_token_list([f"token {number}" for number in range(300)])
    writer.add_chat_template(CHATML)
    for key, text in texts.items():
        writer.add_string(f"general.{key}", text)
    for name, kind in types.items():
        numbers = DICE.normal(size=(OUT, WIDTH)).astype(np.float32)
        if kind is T.Q4_K:  # the package reads it and does not write it: a block of zeros will do
            block, width = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor(name, np.zeros((OUT, WIDTH // block * width), np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    return closed(writer, path)


def write_lora(path: Path, names: Sequence[str], *, out: int = OUT, strength: float = 0.3) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name in names:
        writer.add_tensor(f"{name}.lora_a", DICE.normal(size=(RANK, WIDTH)).astype(np.float32) * strength)
        writer.add_tensor(f"{name}.lora_b", DICE.normal(size=(out, RANK)).astype(np.float32) * strength)
    return closed(writer, path)


def closed(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def numbers(tensor: Any) -> Any:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


TYPES: Types = {"a.weight": T.Q4_1, "b.weight": T.F16, "c.weight": T.Q8_0, "d.weight": T.F32, "k.weight": T.Q4_K}
TOUCHED = ("a.weight", "b.weight", "d.weight")


def adapted(folder: Path, names: Sequence[str] = TOUCHED, types: Types = TYPES, **lora: Any) -> tuple[Path, Path, Path]:
    """A checkpoint that is an adapter; the base; the adapter."""
    base = write_base(folder / "base.gguf", types, license="apache-2.0")
    adapter = write_lora(folder / "adapter.gguf", names, **lora)
    checkpoint = write_checkpoint(folder / "models", TASK, PROBE, weights=adapter.read_bytes(), base=base)
    return checkpoint, base, adapter


def ordered(checkpoint: Path, to: Path, format: export.Format = "gguf", task: Task = TASK, **more: Any) -> Order:
    return Order(checkpoint, task, "v1", format, to, **more)


def test_a_merged_file_is_the_base_with_the_adapter_added(tmp_path: Path) -> None:
    checkpoint, base, adapter = adapted(tmp_path)
    done = export.write(ordered(checkpoint, tmp_path / "out"))
    before, after, pairs = tensors(base), tensors(tmp_path / "out" / "model.gguf"), tensors(adapter)
    assert list(after) == list(before)
    assert {name: tensor.tensor_type for name, tensor in after.items()} == dict(TYPES) | {"a.weight": T.Q8_0}
    for name, merged in after.items():
        if name not in TOUCHED:
            assert merged.data.tobytes() == before[name].data.tobytes()
            continue
        change = ALPHA / RANK * (numbers(pairs[f"{name}.lora_b"]) @ numbers(pairs[f"{name}.lora_a"]))
        wanted = numbers(before[name]) + change
        assert np.abs(change).max() > 0.5
        step = np.abs(wanted).max() / 127 if name == "a.weight" else 0.004  # of the type that holds it
        np.testing.assert_allclose(numbers(merged), wanted, atol=step)
    assert done.files["model.gguf"] == sha256((tmp_path / "out" / "model.gguf").read_bytes()).hexdigest()
    assert done.notes == ("3 tensors merged (F16 -> F16, F32 -> F32, Q4_1 -> Q8_0), 2 copied as they are",)
    assert weights.check(tmp_path / "out" / "model.gguf").kind == "model"


def test_metadata_stays_the_bases_byte_for_byte(tmp_path: Path) -> None:
    checkpoint, base, _ = adapted(tmp_path)
    export.write(ordered(checkpoint, tmp_path / "out"))
    start = int(gguf.GGUFReader(base).tensors[0].field.offset)
    assert (tmp_path / "out" / "model.gguf").read_bytes()[:start] == base.read_bytes()[:start]


@pytest.mark.parametrize("kind", ["same", "F16", "BF16", "Q5_0", "Q4_0"])
def test_touched_tensors_take_the_type_that_was_asked_for(tmp_path: Path, kind: str) -> None:
    checkpoint, _, _ = adapted(tmp_path, ("a.weight",))
    export.write(ordered(checkpoint, tmp_path / "out", type=kind))
    found = tensors(tmp_path / "out" / "model.gguf")["a.weight"].tensor_type.name
    assert found == ("Q4_1" if kind == "same" else kind)


def test_a_small_change_outlives_eight_bits_and_not_four(tmp_path: Path) -> None:
    checkpoint, base, adapter = adapted(tmp_path, ("a.weight",), strength=0.1)
    before, pairs = numbers(tensors(base)["a.weight"]), tensors(adapter)
    change = ALPHA / RANK * (numbers(pairs["a.weight.lora_b"]) @ numbers(pairs["a.weight.lora_a"]))
    left = {}
    for kind in ("Q8_0", "same"):
        export.write(ordered(checkpoint, tmp_path / kind, type=None if kind == "Q8_0" else kind))
        merged = numbers(tensors(tmp_path / kind / "model.gguf")["a.weight"]) - before
        left[kind] = float(np.abs(merged - change).mean() / np.abs(change).mean())
    assert left["Q8_0"] < 0.5
    assert left["same"] > 2 * left["Q8_0"]


def test_a_type_that_cannot_be_made_is_named_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint, _, _ = adapted(tmp_path, ("k.weight",))
    with pytest.raises(ConfigError, match=r"'k\.weight' cannot be made Q4_K here") as caught:
        export.write(ordered(checkpoint, tmp_path / "out" / "deep", type="same"))
    assert "llama-quantize" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="no type 'Q3_X'"):
        export.write(ordered(checkpoint, tmp_path / "out" / "deep", type="Q3_X"))
    assert list((tmp_path / "out").iterdir()) == []
    export.write(ordered(checkpoint, tmp_path / "out" / "deep"))
    assert tensors(tmp_path / "out" / "deep" / "model.gguf")["k.weight"].tensor_type is T.Q8_0


@pytest.mark.parametrize(
    ("names", "out", "said"),
    [(("z.weight",), OUT, "no tensor 'z.weight'"), (("a.weight",), 2 * OUT, "does not fit 'a.weight'")],
)
def test_an_adapter_of_another_base_leaves_nothing_behind(
    tmp_path: Path, names: Sequence[str], out: int, said: str
) -> None:
    checkpoint, _, _ = adapted(tmp_path, names, out=out)
    (tmp_path / "room").mkdir()
    with pytest.raises(ConfigError, match=said):
        export.write(ordered(checkpoint, tmp_path / "room" / "out"))
    assert list((tmp_path / "room").iterdir()) == []


def test_the_base_must_be_the_one_that_was_taught_on(tmp_path: Path) -> None:
    checkpoint, base, _ = adapted(tmp_path)
    other = write_base(tmp_path / "other.gguf", TYPES)
    with pytest.raises(ConfigError, match="is another file"):
        export.write(ordered(checkpoint, tmp_path / "out", base=other))
    moved = base.rename(tmp_path / "moved.gguf")
    export.write(ordered(checkpoint, tmp_path / "out", base=moved))


def test_a_whole_model_is_copied_as_it_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "whole.gguf", TYPES)
    checkpoint = write_checkpoint(tmp_path / "models", TASK, PROBE, weights=base.read_bytes())
    export.write(ordered(checkpoint, tmp_path / "out"))
    assert (tmp_path / "out" / "model.gguf").read_bytes() == base.read_bytes()


async def opinions(adapter: Path | None = None, **settings: Any) -> list[dict[str, float]]:
    """What a real llama.cpp says of the next token after some texts: log-probabilities of the likeliest."""
    model: Local = owned(**settings)
    model._speaker._adapter = adapter  # type: ignore[attr-defined]
    await model.ready(300)
    asked = {"n_predict": 1, "temperature": 0, "n_probs": 200, "cache_prompt": False}
    found = []
    for text in ("One, two, three,", "The capital of France is", "Water boils at", "def main("):
        said = (await model._api.post("/completion", asked | {"prompt": text})).body
        assert said is not None
        tokens = said["completion_probabilities"][0]["top_logprobs"]
        found.append({token["token"]: token["logprob"] for token in tokens if token["logprob"] > -8})
    answer = await model.answer(asks(fields(word={"type": "string", "enum": ["apple", "river"]})), {"text": "one"})
    assert answer.problem is None
    await model.close()
    return found


def apart(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """How far two opinions differ: the mean over the tokens that both think of."""
    pairs = [(a[token], b[token]) for a, b in zip(one, other, strict=True) for token in a.keys() & b.keys()]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.slow
async def test_llama_cpp_answers_from_the_merged_file_as_from_base_and_adapter(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    write_adapter(adapter, smollm2(), 0.1)
    checkpoint = write_checkpoint(tmp_path / "models", TASK, PROBE, weights=adapter.read_bytes(), base=smollm2())
    done = export.write(ordered(checkpoint, tmp_path / "out"))
    assert done.notes == ("60 tensors merged (Q4_1 -> Q8_0), 212 copied as they are",)
    both = await opinions(adapter)
    merged = await opinions(model=str(tmp_path / "out" / "model.gguf"))
    bare = await opinions()
    # The server computes with another precision for another type, which by itself moves these by about 0.1.
    assert apart(both, merged) < 0.4
    assert apart(both, bare) > 3 * apart(both, merged)


# --- Ollama -------------------------------------------------------------------------------------------------------------


def test_a_folder_for_ollama_has_what_create_reads(tmp_path: Path) -> None:
    checkpoint, _, _ = adapted(tmp_path)
    to = tmp_path / "out"
    done = export.write(ordered(checkpoint, to, "ollama", context=2048))
    assert {path.name for path in to.iterdir()} == {"model.gguf", "Modelfile", "README.md", "manifest.json"}
    said = (to / "Modelfile").read_text()
    lines = said.splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert {"PARAMETER num_ctx 512", "PARAMETER temperature 0", 'PARAMETER stop "<|im_end|>"'} <= set(lines)
    assert 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}' in said
    assert 'LICENSE """apache-2.0"""' in lines
    assert TASK.description in said.partition('SYSTEM """')[2]
    assert done.commands == (f"ollama create apprentice-label-v1 -f {to}/Modelfile", "ollama run apprentice-label-v1")


def test_ollama_takes_the_adapter_alone_too(tmp_path: Path) -> None:
    checkpoint, base, adapter = adapted(tmp_path)
    export.write(ordered(checkpoint, tmp_path / "out", "ollama", adapter_only=True, licence="Apache-2.0"))
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {base}", "ADAPTER ./adapter.gguf"]
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == adapter.read_bytes()
    assert not any(line.startswith("TEMPLATE") for line in lines)
    assert 'LICENSE """Apache-2.0"""' in lines


def test_a_text_that_would_end_its_own_quotes_is_refused(tmp_path: Path) -> None:
    checkpoint, _, _ = adapted(tmp_path)
    task = TASK.model_copy(update={"description": 'Say """ and\nPARAMETER temperature 9'})
    with pytest.raises(ConfigError, match="cannot hold"):
        export.write(ordered(checkpoint, tmp_path / "out", "ollama", task))
    assert not (tmp_path / "out").exists()


# --- safetensors --------------------------------------------------------------------------------------------------------

DTYPES = {"F32": np.float32, "F16": np.float16}
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def raw(numbers: Any, dtype: str) -> bytes:
    """Its bytes in a file; for BF16 of numbers that it holds exactly."""
    if dtype == "BF16":
        return bytes((numbers.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
    return bytes(numbers.astype(DTYPES[dtype]).tobytes())


def held(numbers: Any, dtype: str) -> Any:
    """The numbers, cut down to what the type holds."""
    if dtype == "BF16":
        return (numbers.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return numbers.astype(DTYPES[dtype]).astype(np.float32)


def write_folder(folder: Path, dtype: str, *, parts: int = 2) -> dict[str, Any]:
    """A base model as transformers keeps it, in one or several files; its numbers by name."""
    folder.mkdir()
    found = {f"{layer}.weight": held(DICE.normal(size=(6, 8)), dtype) for layer in LAYERS}
    found["model.norm.weight"] = held(DICE.normal(size=(8,)), dtype)
    places = {name: f"model-{number % parts + 1:05}-of-{parts:05}.safetensors" for number, name in enumerate(found)}
    for file in sorted(set(places.values())):
        header, data = {}, b""
        for name in [name for name, place in places.items() if place == file]:
            content = raw(found[name], dtype)
            header[name] = hostile.tensor(dtype, found[name].shape, len(data), len(data) + len(content))
            data += content
        (folder / ("model.safetensors" if parts == 1 else file)).write_bytes(hostile.safetensors(header, data))
    if parts > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\nthe base's own card\n")
    (folder / "LICENSE").write_text("the base's own licence\n")
    return found


def peft(folder: Path, layers: Sequence[str], *, out: int = 6, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A checkpoint as the trainer huggingface leaves it: the adapter in both forms; and A and B by name."""
    pairs = {}
    for layer in layers:
        pairs[f"base_model.model.{layer}.lora_A.weight"] = DICE.normal(size=(RANK, 8)).astype(np.float32)
        pairs[f"base_model.model.{layer}.lora_B.weight"] = DICE.normal(size=(out, RANK)).astype(np.float32)
    base = folder / "gguf-base"
    base.write_bytes(b"its hash is all that is asked for here")
    made = write_checkpoint(
        folder / "models", TASK, PROBE, base=base, file="peft/adapter_model.safetensors", weights=b""
    )
    (made / "peft" / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(pairs))
    told = json.loads((made / "peft" / "adapter_config.json").read_bytes()) | {"lora_alpha": ALPHA, "r": RANK} | changes
    (made / "peft" / "adapter_config.json").write_text(json.dumps(told))
    manifest = json.loads((made / "manifest.json").read_bytes())
    manifest["files"] = {
        f"peft/{path.name}": sha256(path.read_bytes()).hexdigest() for path in (made / "peft").iterdir()
    }
    written = json.dumps(manifest).encode()
    (made / "manifest.json").write_bytes(written)
    return made.rename(made.with_name(f"sha256-{sha256(written).hexdigest()}")), pairs


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_merged_folder_is_the_base_with_the_adapter_added(tmp_path: Path, dtype: str, parts: int) -> None:
    before = write_folder(tmp_path / "base", dtype, parts=parts)
    checkpoint, pairs = peft(tmp_path, LAYERS[1:])
    to = tmp_path / "out"
    done = export.write(ordered(checkpoint, to, "safetensors", base=tmp_path / "base"))
    found = weights.check(to, expected=weights.Expected(kind="model"))
    assert (found.architecture, found.types) == ("llama", (dtype,))
    step = {"F32": 1e-6, "F16": 2**-11, "BF16": 2**-8}[dtype]  # half of the last place, relative
    for file in to.glob("*.safetensors"):
        with weights._source.opened(file) as source:
            placed = weights._tensors.read_safetensors(source)
        for tensor in placed:
            content = file.read_bytes()[tensor.start : tensor.start + tensor.size]
            layer = tensor.name.removesuffix(".weight")
            if layer not in LAYERS[1:]:
                assert content == raw(before[tensor.name], dtype)
                continue
            name = f"base_model.model.{layer}.lora_"
            wanted = before[tensor.name] + ALPHA / RANK * pairs[f"{name}B.weight"] @ pairs[f"{name}A.weight"]
            if dtype == "BF16":
                merged = (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                merged = np.frombuffer(content, DTYPES[dtype]).astype(np.float32)
            np.testing.assert_allclose(merged.reshape(wanted.shape), wanted, rtol=step * 1.01, atol=1e-5)
    assert (done.licence, done.notes) == ("mit", ("2 tensors merged",))
    assert (to / "LICENSE").read_text() == "the base's own licence\n"
    card = (to / "README.md").read_text()
    assert "the base's own card" not in card
    assert "- the model it is made of: mit" in card


def test_a_rank_stabilised_adapter_is_scaled_by_the_root_of_its_rank(tmp_path: Path) -> None:
    before = write_folder(tmp_path / "base", "F32", parts=1)
    checkpoint, pairs = peft(tmp_path, LAYERS[:1], use_rslora=True)
    export.write(ordered(checkpoint, tmp_path / "out", "safetensors", base=tmp_path / "base"))
    merged = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")[f"{LAYERS[0]}.weight"]
    a, b = (pairs[f"base_model.model.{LAYERS[0]}.lora_{side}.weight"] for side in "AB")
    np.testing.assert_allclose(merged, before[f"{LAYERS[0]}.weight"] + ALPHA / RANK**0.5 * b @ a, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_the_base_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "base", "F32")
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    stranger, _ = peft(tmp_path / "1", ("model.layers.9.self_attn.q_proj",))
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.9\.self_attn\.q_proj\.weight'"):
        export.write(ordered(stranger, tmp_path / "out", "safetensors", base=tmp_path / "base"))
    larger, _ = peft(tmp_path / "2", LAYERS[:1], out=12)
    with pytest.raises(ConfigError, match="does not fit"):
        export.write(ordered(larger, tmp_path / "out", "safetensors", base=tmp_path / "base"))
    with pytest.raises(ConfigError, match="the base is not a folder"):
        export.write(ordered(larger, tmp_path / "out", "safetensors"))
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UnsafeFile, match="can run code"):
        export.write(ordered(larger, tmp_path / "out", "safetensors", base=tmp_path / "base"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "1", "2"}


def test_an_adapter_as_peft_writes_it_leaves_as_gguf(tmp_path: Path) -> None:
    write_folder(tmp_path / "base", "F32")
    checkpoint, pairs = peft(tmp_path, LAYERS[2:])
    with pytest.raises(ConfigError, match="its adapter as safetensors only"):
        export.write(ordered(checkpoint, tmp_path / "out"))
    export.write(ordered(checkpoint, tmp_path / "out", adapter_only=True, base=tmp_path / "base"))
    found = tensors(tmp_path / "out" / "adapter.gguf")
    assert set(found) == {"blk.1.ffn_up.weight.lora_a", "blk.1.ffn_up.weight.lora_b"}
    wanted = pairs[f"base_model.model.{LAYERS[2]}.lora_A.weight"]
    np.testing.assert_array_equal(numbers(found["blk.1.ffn_up.weight.lora_a"]), wanted)


def test_what_is_gguf_only_is_not_turned_into_safetensors(tmp_path: Path) -> None:
    base = write_base(tmp_path / "whole.gguf", TYPES)
    checkpoint = write_checkpoint(tmp_path / "models", TASK, PROBE, weights=base.read_bytes())
    with pytest.raises(ConfigError, match="no adapter as PEFT writes it") as caught:
        export.write(ordered(checkpoint, tmp_path / "out", "safetensors"))
    assert "--as gguf" in (caught.value.hint or "")


# --- the folder ---------------------------------------------------------------------------------------------------------


def test_an_export_replaces_nothing_but_an_export_and_only_when_told(tmp_path: Path) -> None:
    checkpoint, base, _ = adapted(tmp_path)
    to = tmp_path / "out"
    to.mkdir()
    export.write(ordered(checkpoint, to))  # an empty folder is none
    before = (to / "model.gguf").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="holds an export already") as caught:
        export.write(ordered(checkpoint, to))
    assert "--force" in (caught.value.hint or "")
    export.write(ordered(checkpoint, to, force=True))
    assert (to / "model.gguf").stat().st_mtime_ns != before
    (to / "manifest.json").write_text("{}")
    for there in (to, base):
        with pytest.raises(ConfigError, match="is there already, and is no export"):
            export.write(ordered(checkpoint, there, force=True))
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "adapter.gguf", "models", "out"}


def test_a_failed_export_leaves_the_former_one(tmp_path: Path) -> None:
    checkpoint, base, _ = adapted(tmp_path)
    export.write(ordered(checkpoint, tmp_path / "out"))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    base.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is another file"):
        export.write(ordered(checkpoint, tmp_path / "out", force=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


def test_killed_at_any_moment_it_leaves_a_whole_export_or_none(tmp_path: Path) -> None:
    checkpoint, _, _ = adapted(tmp_path)
    (tmp_path / "room").mkdir()
    program = (
        "from pathlib import Path\n"
        "from apprentice import export\n"
        "from apprentice.testing.models import TASK\n"
        f"export.write(export.Order(Path({str(checkpoint)!r}), TASK, 'v1', 'gguf', Path({str(tmp_path / 'room' / 'out')!r})))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program])
    while child.poll() is None and not any((tmp_path / "room").iterdir()):
        time.sleep(0.001)
    child.kill()
    child.wait()
    if (tmp_path / "room" / "out").exists():
        weights.check(tmp_path / "room" / "out" / "model.gguf")
    export.write(ordered(checkpoint, tmp_path / "room" / "out", force=True))
    assert weights.check(tmp_path / "room" / "out" / "model.gguf").kind == "model"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    checkpoint, _, _ = adapted(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"out cannot be written: (Not a directory|File exists)"):
        export.write(ordered(checkpoint, tmp_path / "file" / "out"))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes 1,152,921,504,606,846,976 bytes, and the disk has [\d,]+ free"):
        export._check_room(tmp_path, 2**60)


def test_card_and_manifest_say_origin_licence_and_hashes(tmp_path: Path) -> None:
    checkpoint = plugins.build("trainers", "embedded", encoder="wordllama").train(
        SORT,
        examples(),
        into=tmp_path / "models",
        seed=0,
        licence={"by": [{"teacher": "us", "model": "m-1", "terms": "own", "basis": "ours", "rows": 72}]},
    )
    to = tmp_path / "out"
    done = export.write(ordered(checkpoint.path, to, "onnx", SORT))
    card, told = (to / "README.md").read_text(), json.loads((to / "manifest.json").read_bytes())
    for name, digest in done.files.items():
        assert sha256((to / name).read_bytes()).hexdigest() == digest == told["files"][name]
        assert f"{digest}  {name}" in card
    assert set(done.files) == {"model.onnx", "tokenizer.json"}
    assert "- 72 training rows: us, m-1, own, ours" in card
    assert "- learned from 72 examples" in card
    assert "MIT (WordLlama)" in card
    assert (told["checkpoint"], told["version"], told["task"]) == (checkpoint.id, "v1", "sort")
    assert told["licence"]["rows"]["by"][0]["rows"] == 72
    assert SORT.description in card


def test_a_format_that_a_checkpoint_does_not_have_is_told_with_the_right_one(tmp_path: Path) -> None:
    student = plugins.build("trainers", "embedded", encoder="tfidf").train(SORT, examples(), into=tmp_path, seed=0).path
    with pytest.raises(ConfigError, match="no language model") as caught:
        export.write(ordered(student, tmp_path / "out"))
    assert "onnx" in (caught.value.hint or "")
    adapter, _, _ = adapted(tmp_path)
    with pytest.raises(ConfigError, match="no embedded student"):
        export.write(ordered(adapter, tmp_path / "out", "onnx"))
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "manifest.json").write_text('{"kind": "reference"}')
    with pytest.raises(ConfigError, match="of the kind 'reference'"):
        export.write(ordered(tmp_path / "reference", tmp_path / "out"))
    with pytest.raises(ConfigError, match="is no checkpoint"):
        export.write(ordered(tmp_path / "gone", tmp_path / "out"))


# --- the command --------------------------------------------------------------------------------------------------------


def kept(folder: Path, checkpoint: Path, local: str) -> None:
    """A configuration in the folder, and a store in which this checkpoint is the champion of the task."""
    text = YAML[: YAML.index("local:")].replace("BASE_URL", "http://127.0.0.1:9")
    (folder / "apprentice.yaml").write_text(f"{text}local: {local}\n")
    config = load(folder / "apprentice.yaml")

    async def add() -> None:
        store: Store = plugins.build("stores", "sqlite", path=config.store.path)
        about = {"checkpoint": checkpoint.name, "path": str(checkpoint), "trained_on": 1, "created_at": 1.0}
        version = Version(id="", task="sort", state="candidate", **about)
        await store.promote("sort", (await store.add_version(version)).id, 1.0)
        await store.close()

    asyncio.run(add())


def test_the_command_exports_what_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, base, _ = adapted(tmp_path)
    kept(tmp_path, checkpoint, f"{{backend: llama_cpp, base_model: {base}, learn: 'off', fine_tune_backend: null}}")
    assert cli.main(["models", "export", "sort", "--as", "ollama", "--to", "out"]) == 0
    said = capsys.readouterr().out
    assert "3 tensors merged" in said
    assert "ollama create apprentice-sort-v1 -f out/Modelfile" in said
    assert cli.main(["models", "export", "sort", "--as", "gguf", "--to", "out"]) == 2
    assert "--force" in capsys.readouterr().err
    told = ["models", "export", "sort", "v1", "--as", "gguf", "--to", "out", "--type", "F16", "--force", "--json"]
    assert cli.main(told) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["files"] == {"model.gguf": sha256((tmp_path / "out" / "model.gguf").read_bytes()).hexdigest()}
    assert done["notes"] == ["3 tensors merged (F16 -> F16, F32 -> F16, Q4_1 -> F16), 2 copied as they are"]
    assert cli.main(["models", "export", "sort", "--to", "out"]) == 2
    assert "needs --as and --to" in capsys.readouterr().err


def test_an_exported_student_is_probed_and_measured_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = YAML[: YAML.index("local:")].replace("BASE_URL", "http://127.0.0.1:9")
    text = text.replace(
        "    evaluator:", "    examples: [{input: {text: an otter}, output: {kind: animal}}]\n    evaluator:"
    )
    (tmp_path / "apprentice.yaml").write_text(f"{text}local: {{backend: embedded}}\n")
    task = load(tmp_path / "apprentice.yaml").task("sort").task
    student = plugins.build("trainers", "embedded", encoder="wordllama").train(
        task, examples(), into=tmp_path / "models", seed=0
    )
    kept(tmp_path, student.path, "{backend: embedded}")
    assert cli.main(["models", "export", "sort", "--as", "onnx", "--to", "out"]) == 0
    capsys.readouterr()
    served = "local: {backend: onnx, base_model: out, learn: 'off', fine_tune_backend: null}\n"
    (tmp_path / "apprentice.yaml").write_text(text + served)
    assert cli.main(["models", "bench", "sort", "base", "--requests", "3", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["valid"], done["failed"], done["requests"]) == (1.0, 0, 3)


def test_the_command_says_where_there_is_nothing_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = YAML[: YAML.index("local:")].replace("BASE_URL", "http://127.0.0.1:9")
    for local in (
        "{backend: embedded}",
        "{backend: llama_cpp, base_model: b.gguf, learn: 'off', fine_tune_backend: null}",
    ):
        (tmp_path / "apprentice.yaml").write_text(f"{text}local: {local}\n")
        assert cli.main(["models", "export", "sort", "--as", "onnx", "--to", "out"]) == 5
        assert "version" in capsys.readouterr().err
