"""The JSON files and the chat template beside the weights: what libraries would import, fetch or run because of them.

The keys of adapter_config.json are those of LoraConfig in peft 0.18 (https://huggingface.co/docs/peft). A field that
names code, a pattern that would run as a regular expression, or a kind of adapter that no check here knows must be unset.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from apprentice.types import Json
from apprentice.weights._source import Source, read_json

_MOST_RANK = 1_024
_MOST_TEMPLATE = 256 * 1024  # characters; the longest that we know of have 20,000
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
# Keys by which transformers, peft and diffusers import code from the folder or fetch it.
_CODE = frozenset({"auto_map", "auto_mapping", "custom_pipelines", "custom_generate", "trust_remote_code"})
# How templates left sandboxes (CVE-2016-10745, CVE-2019-10906, CVE-2024-34359, CVE-2024-56201, CVE-2024-56326,
# CVE-2025-27516), and what makes them grow: huge numbers, other templates.
_TEMPLATE = re.compile(
    r"__|\\x5f|\\u005f|\\U0000005f|\\137|(?-i:\\N\{)|\|\s*attr\b|\.\s*format(?:_map)?\b|\.\s*mro\b|\bgetattr\b|\blipsum\b"
    r"|\bcycler\b|\bjoiner\b|\bself\s*[.\[]|\bget_flashed_messages\b|\burl_for\b"
    r"|\{%[-+]?\s*(?:include|import|from|extends)\b"
    r"|(?:[0-9]_?){7}|[0-9]\s*\*\*\s*[0-9]",
    re.IGNORECASE,
)


def check_template(template: Json, source: Source) -> str:
    """The chat template, if it uses nothing that left a sandbox before.

    This reads the text and renders nothing; who renders it must do so in a sandbox (jinja2's ImmutableSandboxedEnvironment,
    or a renderer without Python objects such as llama.cpp's), because a text can be put together in ways that no list has.
    """
    if not isinstance(template, str) or len(template) > _MOST_TEMPLATE:
        raise source.refused(f"its chat template is no text of at most {_MOST_TEMPLATE:,} characters")
    found = _TEMPLATE.search(template)
    if found is not None:
        raise source.refused(f"its chat template uses {found[0]!r}, which no chat template needs")
    return template


def read_adapter(source: Source, base: str | None) -> tuple[int, str]:
    """The rank and the base model that an adapter_config.json states.

    `base`: the model that it must be for. Refused: other base models, addresses and paths, unknown keys, other values
    than those of a plain LoRA.
    """
    told = read_json(source, most=2**16)
    if not isinstance(told, dict):
        raise source.refused("it is no JSON object")
    for key, value in told.items():
        if key not in _ADAPTER:
            raise source.refused(f"{key[:80]!r} is no field of a plain LoRA")
        if not _ADAPTER[key](value):
            raise source.refused(f"{key} may not be {str(value)[:80]!r} in a plain LoRA")
    missing = {"peft_type", "r", "base_model_name_or_path"} - told.keys()
    if missing:
        raise source.refused(f"{min(missing)} is missing")
    name, rank = told["base_model_name_or_path"], told["r"]
    assert isinstance(rank, int), "looked at above"
    if base is not None and name != base:
        raise source.refused(f"it is for the base model {str(name)[:80]!r}, not {base!r}")
    if not isinstance(name, str) or (base is None and not _is_model_name(name)):
        raise source.refused(f"{str(name)[:80]!r} is no name of a base model")
    return rank, name


def read_model(source: Source) -> dict[str, Json]:
    """config.json of a whole model: no key that brings in code, at any depth."""
    told = read_plain(source)
    if not isinstance(told, dict) or not _word(told.get("model_type")):
        raise source.refused("it does not state model_type")
    return told


def read_tokenizer(source: Source) -> str | None:
    """The chat template in a tokenizer_config.json, None without; of several the one called `default`."""
    told = read_plain(source)
    if not isinstance(told, dict) or not (told.get("tokenizer_class") is None or _word(told["tokenizer_class"])):
        raise source.refused("it is no JSON object with a plain tokenizer_class")
    given = told.get("chat_template")
    if given is None:
        return None
    if isinstance(given, str):
        return check_template(given, source)
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise source.refused("its chat_template is neither a text nor a list of them")
    named = {
        str(item.get("name")): check_template(item.get("template"), source) for item in given if isinstance(item, dict)
    }
    return named.get("default")


def read_index(source: Source) -> dict[str, str]:
    """Tensor -> file, of a model in several files."""
    told = read_plain(source)
    places = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(places, dict):
        raise source.refused("it has no weight_map")
    return {name: str(file) for name, file in places.items()}


def read_plain(source: Source) -> Json:
    """Any settings file: bounded JSON in which nothing names code to import or fetch."""
    told = read_json(source)
    for key, value in _pairs(told):
        if key in _CODE and value not in (None, False):
            raise source.refused(f"{key} would bring in code")
        if "attn_implementation" in key and isinstance(value, str) and not _WORD.fullmatch(value):
            raise source.refused(f"{key} would fetch code: {value[:80]!r}")
    return told


def _pairs(told: Json) -> Iterator[tuple[str, Json]]:
    waiting = [told]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


# --- the values of a plain LoRA ---------------------------------------------------------------------------------------


def _unset(value: Json) -> bool:
    return value is None or value is False or value == {} or value == []


def _truth(value: Json) -> bool:
    return isinstance(value, bool)


def _word(value: Json) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _is_model_name(value: str) -> bool:
    return _MODEL_NAME.fullmatch(value) is not None and ".." not in value


def _number(low: float, high: float, *, whole: bool = False) -> Callable[[Json], bool]:
    def fits(value: Json) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or (whole and type(value) is not int):
            return False
        return low <= value <= high

    return fits


def _one_of(*values: Json) -> Callable[[Json], bool]:
    return lambda value: any(value == allowed and type(value) is type(allowed) for allowed in values)


def _words(value: Json) -> bool:
    """Names of modules. A single text would be a regular expression to peft, so it is none."""
    return value is None or (isinstance(value, list) and len(value) <= 1_000 and all(_word(item) for item in value))


def _modules(value: Json) -> bool:
    return value == "all-linear" or _words(value)


def _layers(value: Json) -> bool:
    items = value if isinstance(value, list) and len(value) <= 1_000 else [value]
    return value is None or all(_number(0, 10_000, whole=True)(item) for item in items)


def _text_or_none(value: Json) -> bool:
    return value is None or _word(value)


_ADAPTER: dict[str, Callable[[Json], bool]] = {
    "base_model_name_or_path": lambda value: isinstance(value, str),
    "bias": _one_of("none"),
    "exclude_modules": _words,
    "fan_in_fan_out": _truth,
    "inference_mode": _truth,
    "init_lora_weights": _one_of(True, False, "gaussian"),
    "layers_pattern": _words,
    "layers_to_transform": _layers,
    "lora_alpha": _number(0, 65_536),
    "lora_dropout": _number(0, 1),
    "megatron_core": _one_of(None, "megatron.core"),  # peft writes it always and imports it with megatron_config only
    "peft_type": _one_of("LORA"),
    "peft_version": _text_or_none,
    "qalora_group_size": _number(1, 65_536, whole=True),
    "r": _number(1, _MOST_RANK, whole=True),
    "revision": _text_or_none,
    "target_modules": _modules,
    "task_type": _one_of(None, "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION"),
    "use_rslora": _truth,
} | dict.fromkeys(
    (
        "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "corda_config", "ensure_weight_tying",
        "eva_config", "layer_replication", "loftq_config", "lora_bias", "megatron_config", "modules_to_save",
        "rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_qalora",
    ),
    _unset,
)  # fmt: skip
