"""Only safe files load: what model files hold, and that they are what they should be, before any library opens them.

    contents = weights.check(folder, expected=weights.Expected(kind="adapter", base="Qwen/Qwen3-0.6B", rank=16))
    version = weights.digest(folder)                  # "sha256-" and 64 digits, names the content
    weights.unpack(archive, into)                     # then check(into)

Safe are safetensors and GGUF, with settings that name no code. Pickles (.bin, .pt, .pth, .ckpt, .pkl) and NumPy archives
are refused unread, and so is every file that has no business beside weights. Nothing is imported, rendered or run for
it, no length in a file is believed, and memory stays small whatever the size.

Not told: whether the numbers are any good (an evaluation tells), whether a chat template is harmless (it is searched for
known attacks only; render it in a sandbox), whether the file is the same a moment later (take the digest, and keep it
where only you write).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from apprentice.types import Json
from apprentice.weights import _settings
from apprentice.weights._archives import Limits, unpack
from apprentice.weights._gguf import Gguf, read_gguf
from apprentice.weights._source import Entry, Source, entries, opened, refused
from apprentice.weights._tensors import Tensor, check_numbers, check_pairs, read_safetensors

__all__ = ["ARCHITECTURES", "Contents", "Expected", "Limits", "check", "checked_digest", "digest", "unpack"]

ARCHITECTURES = frozenset({
    "arcee", "cohere2", "command-r", "ernie4_5", "exaone", "exaone4", "falcon", "falcon-h1", "falcon_h1", "gemma", "gemma2",
    "gemma3", "gemma3_text", "gemma3n", "glm4", "gpt-oss", "gpt2", "gpt_oss", "granite", "granitehybrid", "granitemoe",
    "hunyuan-dense", "lfm2", "llama", "minicpm", "ministral", "mistral", "mistral3", "nemotron", "olmo", "olmo2", "phi2",
    "phi3", "qwen2", "qwen2moe", "qwen2_moe", "qwen3", "qwen3moe", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Language models that common servers know, as GGUF and config.json call them."""

_PICKLED = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".dill", ".h5", ".keras"}
)
_SETTINGS = frozenset({"generation_config.json", "special_tokens_map.json", "preprocessor_config.json"})
_TABLES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer.model", "merges.txt", "vocab.txt"})
_PROSE = frozenset({"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md", ".gitattributes"})
_MANIFEST = "manifest.json"  # of a checkpoint of ours
_MOST_TABLE, _MOST_PROSE = 64 * 2**20, 2**20
_PROGRAMS = (
    b"\x7fELF",
    b"MZ",
    b"#!",
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x80\x03",
    b"\x80\x04",
    b"\x80\x05",
    b"\xca\xfe\xba\xbe",
)
_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be in there; None: anything safe. `base`: exactly what adapter_config.json has to name as base model."""

    kind: Literal["adapter", "model"] | None = None
    base: str | None = None
    rank: int | None = None
    architectures: frozenset[str] = ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in checked files. None: not stated there. `size` in bytes, of all files; `context` in tokens.

    `key_width`, `value_width`: of one head, where that is not `width / heads`. `types`: of the numbers, those that take
    most bytes first. `all_numbers`: every floating point number was looked at,
    not a sample. `template`: the chat template, to be rendered in a sandbox only.
    """

    kind: Literal["adapter", "model"]
    format: Literal["safetensors", "gguf"]
    files: tuple[str, ...]
    size: int
    tensors: int
    parameters: int
    types: tuple[str, ...]
    all_numbers: bool
    architecture: str | None = None
    name: str | None = None
    context: int | None = None
    blocks: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    key_width: int | None = None
    value_width: int | None = None
    template: str | None = None
    base: str | None = None
    rank: int | None = None

    @property
    def quantisation(self) -> str:
        """The type of most bytes: F16, Q4_K and so on."""
        return self.types[0]


def check(path: Path, *, expected: Expected | None = None) -> Contents:
    """What a folder or one file of weights holds, once everything in it was found safe and as expected.

    A folder holds an adapter (adapter_config.json and adapter_model.safetensors), a whole model (config.json and its
    safetensors), or one GGUF file; beside them tokenizer files and prose, nothing else. A file is GGUF or safetensors;
    a link to one is followed, because a person named it.
    Raises UnsafeFile that names the file and the reason.
    """
    expected = expected or Expected()
    if path.is_dir():
        contents = _checked_folder(path, expected)
    else:
        _check_suffix(path, path.name)
        with opened(path, follow=True) as source:
            if path.suffix == ".gguf":
                contents = _checked_gguf(source, path.name, expected)
            else:
                contents = _checked_safetensors(source, path.name, expected)
    if expected.kind not in (None, contents.kind):
        raise refused(path, f"it holds no {expected.kind}")
    if expected.rank not in (None, contents.rank):
        raise refused(path, f"its rank is {contents.rank}, not {expected.rank}")
    if expected.base not in (None, contents.base):
        raise refused(path, f"it does not say that it is for the base model {expected.base!r}")
    return contents


def checked_digest(text: str) -> str:
    """The text, if it is a digest as `digest` writes it: "sha256-" and 64 digits of 0-9a-f. Safe as a file name.

    Raises UnsafeFile for anything else, before anybody builds a path from it.
    """
    if not _DIGEST.fullmatch(text):
        raise refused(repr(text[:100]), "it is no digest (sha256- and 64 digits of 0-9a-f)")
    return text


def digest(path: Path) -> str:
    """ "sha256-" and 64 hexadecimal digits that name the content of a file or a flat folder.

    Of a file: SHA-256 of its bytes. Of a folder: SHA-256 of one line `sha256 size name` a file, sorted by name.
    Raises UnsafeFile for links, pipes, devices and folders within, and names that are not plain.
    """
    if not path.is_dir():
        with opened(path, follow=True) as source:
            return f"sha256-{_hash(source)}"
    lines = []
    for entry in entries(path):
        with opened(entry.path) as source:
            lines.append(f"{_hash(source)} {source.size} {entry.name}\n")
    return f"sha256-{sha256(''.join(lines).encode()).hexdigest()}"


def _hash(source: Source) -> str:
    found = sha256()
    for offset in range(0, source.size, _PIECE):
        found.update(source.at(offset, min(_PIECE, source.size - offset)))
    return found.hexdigest()


# --- one file ---------------------------------------------------------------------------------------------------------


def _check_suffix(where: object, name: str) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in _PICKLED:
        raise refused(where, f"{suffix} files can run code when they are loaded; convert it to safetensors")
    if suffix not in (".safetensors", ".gguf"):
        raise refused(where, "it is neither .safetensors nor .gguf")


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, tuple[str, ...]]:
    """Numbers in all, and the types by bytes."""
    numbers, sizes = 0, Counter[str]()
    for tensor in tensors:
        count = 1
        for length in tensor.shape:
            count *= length
        numbers += count
        sizes[tensor.dtype] += tensor.size
    return numbers, tuple(dtype for dtype, _ in sizes.most_common())


def _checked_safetensors(source: Source, name: str, expected: Expected) -> Contents:
    tensors = read_safetensors(source)
    adapter = any(".lora_" in tensor.name for tensor in tensors)
    rank = check_pairs(source, tensors, expected.rank) if adapter else None
    whole = check_numbers(source, tensors)
    kind: Literal["adapter", "model"] = "adapter" if adapter else "model"
    numbers, types = _sizes(tensors)
    return Contents(kind, "safetensors", (name,), source.size, len(tensors), numbers, types, whole, rank=rank)


def _checked_gguf(source: Source, name: str, expected: Expected) -> Contents:
    found = read_gguf(source)
    architecture = found.text("general.architecture")
    if architecture is None or architecture not in expected.architectures:
        raise source.refused(f"its architecture {str(architecture)[:40]!r} is not among those allowed")
    if (found.whole("split.count") or 0) > 1:
        raise source.refused("it is one part of several; merge them")
    kind = found.keys.get("general.type", "model")
    rank = None
    if kind == "adapter":
        if found.text("adapter.type") != "lora":
            raise source.refused("it is an adapter of an unknown kind")
        rank = check_pairs(source, found.tensors, expected.rank, gguf=True)
    elif kind != "model":
        raise source.refused(f"it is neither a model nor an adapter but {str(kind)[:40]!r}")
    template = None
    for key in found.keys:
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            checked = _settings.check_template(found.text(key), source)
            template = checked if key == "tokenizer.chat_template" else template
    whole = check_numbers(source, found.tensors)
    numbers, types = _sizes(found.tensors)
    return Contents(
        kind="adapter" if kind == "adapter" else "model",
        format="gguf",
        files=(name,),
        size=source.size,
        tensors=len(found.tensors),
        parameters=numbers,
        types=types,
        all_numbers=whole,
        architecture=architecture,
        name=found.text("general.name"),
        context=_measure(found, "context_length", 2**26, source),
        blocks=_measure(found, "block_count", 2**12, source),
        width=_measure(found, "embedding_length", 2**20, source),
        heads=_measure(found, "attention.head_count", 2**16, source),
        kv_heads=_measure(found, "attention.head_count_kv", 2**16, source),
        key_width=_measure(found, "attention.key_length", 2**16, source),
        value_width=_measure(found, "attention.value_length", 2**16, source),
        template=template,
        rank=rank,
    )


def _measure(found: Gguf, key: str, most: int, source: Source) -> int | None:
    key = f"{found.text('general.architecture')}.{key}"
    value = found.whole(key)
    if value is not None and not 0 <= value <= most:
        raise source.refused(f"its {key} is {value:,}")
    return value


# --- a folder ---------------------------------------------------------------------------------------------------------


def _checked_folder(folder: Path, expected: Expected) -> Contents:
    files = {entry.name: entry for entry in entries(folder)}
    shards = [entry for name, entry in files.items() if name.endswith((".safetensors", ".gguf"))]
    for name in files:
        if Path(name).suffix.lower() in _PICKLED:
            _check_suffix(folder / name, name)
    is_adapter = "adapter_config.json" in files
    template: str | None = None
    for entry in files.values():
        if entry not in shards:
            template = _checked_beside(entry) or template
    if not shards or (len(shards) > 1 and (is_adapter or any(entry.name.endswith(".gguf") for entry in shards))):
        raise refused(folder, "it holds no weights, or those of several models")
    if is_adapter:
        contents = _checked_adapter(files, expected)
    elif shards[0].name.endswith(".gguf"):
        with opened(shards[0].path) as source:
            contents = _checked_gguf(source, shards[0].name, expected)
    else:
        contents = _checked_model(folder, files, shards, expected)
    size = sum(entry.size for entry in files.values())
    return replace(contents, files=tuple(files), size=size, template=template or contents.template)


def _checked_beside(entry: Entry) -> str | None:
    """A file beside the weights, by its name; the chat template, if it is or has one."""
    most = _MOST_TABLE if entry.name in _TABLES else _MOST_PROSE if entry.name in _PROSE else 8 * 2**20
    if entry.size > most:
        raise refused(entry.path, f"it has {entry.size:,} bytes, of at most {most:,}")
    with opened(entry.path) as source:
        start = source.at(0, min(4, source.size))
        if start.startswith(_PROGRAMS):
            raise source.refused("it is a program, an archive or a pickle")
        if entry.name == "tokenizer_config.json":
            return _settings.read_tokenizer(source)
        if entry.name == "chat_template.jinja":
            try:
                return _settings.check_template(source.at(0, source.size).decode(), source)
            except UnicodeDecodeError as error:
                raise source.refused("it is no UTF-8") from error
        if entry.name in _SETTINGS or entry.name == _MANIFEST:
            _settings.read_plain(source)
        elif not _is_known(entry.name):
            raise source.refused("it has no business beside weights")
    return None


def _is_known(name: str) -> bool:
    weighed = ("config.json", "adapter_config.json", "model.safetensors.index.json")  # read with the weights
    return name in weighed or name in _TABLES or name in _PROSE


def _checked_adapter(files: dict[str, Entry], expected: Expected) -> Contents:
    with opened(files["adapter_config.json"].path) as source:
        rank, base = _settings.read_adapter(source, expected.base)
        if "adapter_model.safetensors" not in files or "config.json" in files:
            raise source.refused("beside it must be adapter_model.safetensors, and no config.json")
    with opened(files["adapter_model.safetensors"].path) as source:
        tensors = read_safetensors(source)
        check_pairs(source, tensors, rank)
        whole = check_numbers(source, tensors)
    numbers, types = _sizes(tensors)
    return Contents("adapter", "safetensors", (), 0, len(tensors), numbers, types, whole, base=base, rank=rank)


def _checked_model(folder: Path, files: dict[str, Entry], shards: Sequence[Entry], expected: Expected) -> Contents:
    if "config.json" not in files:
        raise refused(folder, "it has neither adapter_config.json nor config.json")
    with opened(files["config.json"].path) as source:
        told = _settings.read_model(source)
        if told["model_type"] not in expected.architectures:
            raise source.refused(f"its model_type {str(told['model_type'])[:40]!r} is not among those allowed")
    tensors: list[Tensor] = []
    places: dict[str, str] = {}
    whole = True
    for entry in shards:
        with opened(entry.path) as source:
            found = read_safetensors(source)
            whole = check_numbers(source, found) and whole
            for tensor in found:
                if places.setdefault(tensor.name, entry.name) != entry.name:
                    raise source.refused(f"{tensor.name!r} is in {places[tensor.name]} too")
            tensors += found
    index = files.get("model.safetensors.index.json")
    if (index is None) != (len(shards) == 1):
        raise refused(folder, "several safetensors need an index, one has none")
    if index is not None:
        with opened(index.path) as source:
            if _settings.read_index(source) != places:
                raise source.refused("it does not tell where the tensors are")
    numbers, types = _sizes(tensors)
    return Contents(
        kind="model",
        format="safetensors",
        files=(),
        size=0,
        tensors=len(tensors),
        parameters=numbers,
        types=types,
        all_numbers=whole,
        architecture=str(told["model_type"]),
        context=_whole(told.get("max_position_embeddings")),
        blocks=_whole(told.get("num_hidden_layers")),
        width=_whole(told.get("hidden_size")),
        heads=_whole(told.get("num_attention_heads")),
        kv_heads=_whole(told.get("num_key_value_heads")),
        key_width=_whole(told.get("head_dim")),
        value_width=_whole(told.get("head_dim")),
    )


def _whole(value: Json) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
