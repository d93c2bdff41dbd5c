from __future__ import annotations

import json
import resource
import sys
import time
from datetime import UTC
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import budget
from apprentice.cli import main
from apprentice.config import Config, TaskConfig, init_text, json_schema, load, missing, parse
from apprentice.errors import ConfigError, InvalidAnswer, InvalidInput, MissingExtra, UnknownTask
from apprentice.reading import read
from apprentice.types import Json

# The configuration that was promised to load from the first day on, as it stands.
SEED = """\
# apprentice.yaml
tasks:
  - name: classify_ticket
    description: "Classify support tickets by category and priority"
    input_schema: {text: str, metadata: dict}
    output_schema: {category: str, priority: int, confidence: float}
    evaluator: structured_match  # or: semantic_similarity, exact_match, custom
    match_fields: [category, priority]  # for structured_match
    confidence_thresholds:
      phase1_to_phase2: 50  # training examples before attempting local
      phase2_to_phase3: 0.85  # correlation score to graduate
      coaching_trigger: 0.70  # correlation below this increases sampling
      emergency_threshold: 0.50  # below this, revert to full remote

remote:
  provider: anthropic
  model: claude-sonnet-4-5-20250929
  api_key_env: ANTHROPIC_API_KEY
  # Optionally multiple providers for training diversity
  additional_providers:
    - provider: openai
      model: gpt-4o
      api_key_env: OPENAI_API_KEY

local:
  backend: ollama  # or: vllm, llama_cpp
  base_model: llama3.1:8b  # free, open-weight, LoRA-friendly (alt: mistral:7b)
  fine_tune_backend: unsloth  # or: openai, huggingface, axolotl
  fine_tune_batch_size: 100  # examples before triggering training
  model_dir: ./models/

sampling:
  decay_function: exponential  # or: linear, step
  min_floor: 0.02  # never sample less than 2% of requests
  window_size: 100  # rolling window for correlation calculation
  trend_sensitivity: 0.05  # correlation change that triggers frequency adjustment

budget:
  daily: 10.00
  weekly: 50.00
  monthly: 150.00
  currency: USD
"""

SMALL = """\
tasks:
  - name: route
    description: Route a letter
    input_schema: {text: str, title: str?}
    output_schema: {label: [spam, ham], score: int, why: str}
    evaluator: structured_match
    match_fields: [label]
remote:
  provider: openai
  model: gpt-4o
"""
FILE = Path("/somewhere/apprentice.yaml")


def small(old: str = "", new: str = "") -> str:
    assert old in SMALL
    return SMALL.replace(old, new, 1) if old else SMALL + new


def task(old: str = "", new: str = "") -> TaskConfig:
    return parse(small(old, new)).tasks[0]


# --- what loads -------------------------------------------------------------------------------------------------------


def test_the_seed_loads_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "apprentice.yaml"
    file.write_text(SEED)
    config = load(file)
    ticket = config.task("classify_ticket")
    assert ticket.evaluator_settings == ("structured_match", {"match_fields": ["category", "priority"]})
    assert ticket.task.output_schema["properties"]["priority"] == {"type": "integer"}
    assert config.remote.additional_providers[0].model == "gpt-4o"
    assert config.local.base_model == "llama3.1:8b"
    assert config.local.model_dir == tmp_path / "models"
    assert config.store.path == tmp_path / ".apprentice" / "apprentice.db"
    assert config.budget.limits == {"daily": Decimal(10), "weekly": Decimal(50), "monthly": Decimal(150)}
    assert config.source == file


def test_what_the_seed_lacks_to_serve_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "")  # set, but to nothing
    lacking = "\n".join(missing(parse(SEED)))
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        assert name in lacking
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert "API_KEY" not in "\n".join(missing(parse(SEED)))


@pytest.mark.parametrize("text", [SEED, SMALL, small(new="budget: {daily: 0.1, total: 1234567.654321}\n")])
def test_a_configuration_survives_json_unchanged(text: str) -> None:
    config = parse(text, FILE)
    again = Config.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.model_dump_json() == config.model_dump_json()
    assert again.store.path == Path("/somewhere/.apprentice/apprentice.db")
    assert "source" not in config.model_dump()


def test_configurations_that_differ_are_not_equal() -> None:
    assert parse(SMALL) != parse(small("gpt-4o", "gpt-4"))


def test_money_is_exact() -> None:
    caps = parse(small(new="budget: {daily: 0.1, weekly: 10.00, total: 1e-6}\n")).budget
    assert (caps.daily, caps.weekly, caps.total) == (Decimal("0.1"), Decimal(10), Decimal("0.000001"))


@pytest.mark.parametrize(
    ("cap", "limits"),
    [
        ("", {}),  # no cap unless told
        ("daily: 0", {"daily": 0}),
        ("daily: 0.000001", {"daily": 1}),
        ("daily: 999999999", {"daily": 999_999_999_000_000}),
        ("daily: 999999999.999999", {"daily": 999_999_999_999_999}),
        ("daily: 0.000000001", None),  # less than anything that is booked
        ("daily: 1000000000000", None),  # more than a ledger could count
    ],
)
def test_a_cap_is_the_number_that_was_told_or_none(cap: str, limits: dict[str, int] | None) -> None:  # F23
    text = small(new=f"budget: {{{cap}}}\n")
    if limits is None:
        with pytest.raises(ConfigError, match=r"budget\.daily"):
            parse(text)
    else:
        found = parse(text).budget.limits
        caps = budget.caps("route", 0.0, UTC, overall=found, own={})
        assert [cap.limit for cap in caps] == list(limits.values())


def test_yaml_1_2_reads_no_and_dates_and_times_as_text() -> None:
    loaded = task("[spam, ham]", "[no, yes, 2026-01-01, 1:30]")
    assert loaded.output_schema["label"] == ["no", "yes", "2026-01-01", "1:30"]  # type: ignore[index]  # a mapping here


def test_an_unknown_task_is_told_with_the_nearest_name() -> None:
    with pytest.raises(UnknownTask, match="did you mean 'route'"):
        parse(SMALL).task("ruote")


def test_a_copy_with_another_name_is_another_task_throughout() -> None:
    loaded = task()
    assert loaded.task.name == "route"
    assert loaded.model_copy(update={"name": "sort"}).task.name == "sort"


def test_types_in_braces_need_no_quotes() -> None:
    given = "{a: list[str], b: int?, c: dict[str, list[int]]?, d: enum[x, y], e: [list, x], f: {g: list[str]?}}"
    loaded = task("{label: [spam, ham], score: int, why: str}", given.replace("{a:", "{label: str, a:"))
    assert loaded.output_schema == {
        "label": "str",
        "a": "list[str]",
        "b": "int?",
        "c": "dict[str, list[int]]?",
        "d": "enum[x, y]",
        "e": ["list", "x"],
        "f": {"g": "list[str]?"},
    }


@pytest.mark.parametrize(
    "broken", ["{a: list[str}", "{a: list[str", "{a: list [str]}", "{a: x[1]}", "{a: b?c}", "{list[: 1}"]
)
def test_brackets_that_do_not_match_are_errors(broken: str) -> None:
    with pytest.raises(ConfigError):
        task("{text: str, title: str?}", broken)


def test_the_embedded_backend_brings_its_trainer() -> None:
    assert parse(SMALL).local.fine_tune_backend == "embedded"
    assert parse(small(new="local: {backend: ollama}")).local.fine_tune_backend is None


# --- what is refused, and how ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            small("score: int", "score: integr"),
            ":5: tasks[0].output_schema.score: unknown type 'integr'; did you mean 'int'?",
        ),
        (small("remote:", "remotes:"), ":8: remotes: unknown key; did you mean 'remote'?"),
        (small("  model: gpt-4o", "  modle: gpt-4o"), ":10: remote.modle: unknown key; did you mean 'model'?"),
        (small("  model: gpt-4o\n", ""), ":8: remote.model: is missing"),
        (small("name: route", "name: ro/ute"), ":2: tasks[0].name: "),
        (small("evaluator: structured_match", "evaluator: exakt_match"), ":6: tasks[0].evaluator: no evaluator named"),
        (
            small("match_fields: [label]", "match_fields: [lable]"),
            ":7: tasks[0].match_fields[0]: output_schema has no field",
        ),
        (small("evaluator: structured_match", "evaluator: exact_match"), "has no setting 'match_fields'"),
        (
            small(new="local: {fine_tune_batch_size: '5'}\n"),
            ":11: local.fine_tune_batch_size: should be a valid integer, not str",
        ),
        (
            small(new="local:\n  learn: sometimes\n"),
            ":12: local.learn: should be 'background', 'worker' or 'off', not 'sometimes'",
        ),
        (small(new="sampling: {min_floor: 0}\n"), ":11: sampling.min_floor: should be greater than 0"),
        (small(new="sampling: {min_floor: yes}\n"), "sampling.min_floor: should be a valid number"),
        (small(new="sampling: {repeat_share: 1.1}\n"), "sampling.repeat_share: should be less than or equal to 1"),
        (small(new="sampling: {probe_prompts: -1}\n"), "sampling.probe_prompts: should be greater than or equal to 0"),
        (small(new="sampling: {probe_prompts: 2.5}\n"), "sampling.probe_prompts: should be a valid integer"),
        (small(new="sampling: {probe_hours: 0}\n"), "sampling.probe_hours: should be greater than 0"),
        (small(new="budget: {daily: -1}\n"), ":11: budget.daily: should be greater than or equal to 0"),
        (small(new="budget: {daily: .nan}\n"), ":11: budget.daily: "),
        (small(new="budget: {daily: 0.0000001}\n"), "budget.daily: "),
        (small(new="budget: {currency: EUR}\n"), "budget.currency: should be USD, not EUR"),
        (small(new="budget: {timezone: Mars/Olympus}\n"), "budget.timezone: no time zone"),
        (small(new="remote: {}\n"), ":11: remote: is there twice; the other one is in line 8"),
        (small(new="  price: {input: 1}\n"), ":11: remote.price.output: is missing"),  # F10
        *[
            (small(new=f"  price: {{input: {no_price}, output: 1}}\n"), ":11: remote.price.input: ")  # F10
            for no_price in ("null", "-1", ".nan", ".inf", "-.inf", "free", "[1]", "true")
        ],
        *[
            (small(new=f"  max_tokens: {no_end}\n"), ":11: remote.max_tokens: ")  # F13
            for no_end in ("0", "-1", "1000000000000", "'5'", "1.5", "null")
        ],
        *[
            (small(new=f"  settings: {{{own}: 1}}\n"), f":11: remote.settings.{own}: does not belong here")  # F13, F14
            for own in ("max_tokens", "timeout", "temperature", "model", "base_url", "allow_internal", "api_key")
        ],
        (small(new="  base_url: ftp://example.com\n"), ":11: remote.base_url: should be an address"),
        (small(new="  base_url: https://me:secret@example.com\n"), "should not carry a user name or a password"),
        (small(new="  timeout: .inf\n"), ":11: remote.timeout: "),
        (small(new="teachers: 5\n"), ":11: teachers: should be a valid array"),
        (small(new="1: x\n"), ":11: 1: a key should be text"),
        (
            small("input_schema: {text: str, title: str?}", "input_schema: nowhere:Model"),
            "'nowhere' cannot be imported",
        ),
        (small("  - name", "  - nmae"), "tasks[0].nmae: unknown key; did you mean 'name'?"),
        ("tasks: []\nremote: {provider: openai, model: m}\n", ":1: tasks: should have at least 1 item"),
        ("- a\n", ":1: should be a mapping"),
        ("", ": is empty"),
    ],
)
def test_an_error_names_file_line_field_and_what_would_be_right(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, FILE)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(FILE))


def test_all_errors_are_told_at_once_in_the_order_of_the_file() -> None:
    text = small("score: int", "score: integr").replace("gpt-4o", "5") + "budget: {daily: x}\nlokal: {}\n"
    with pytest.raises(ConfigError) as caught:
        parse(text, FILE)
    lines = [int(line.split(":")[1]) for line in str(caught.value).splitlines()]
    assert lines == [5, 10, 11, 12]


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ("{phase2_to_phase3: 1.0}", "phase2_to_phase3: should be less than 1"),
        ("{phase2_to_phase3: 0}", "phase2_to_phase3: should be greater than 0"),
        ("{emergency_threshold: 0.8}", "emergency_threshold: should not be above coaching_trigger (0.7)"),
        ("{coaching_trigger: 0.9}", "coaching_trigger: should not be above phase2_to_phase3 (0.85)"),
        ("{phase1_to_phase2: 0}", "phase1_to_phase2: should be greater than or equal to 1"),
        ("{phase1_to_phase2: 5.5}", "phase1_to_phase2: should be a valid integer"),
    ],
)
def test_impossible_thresholds_are_refused(thresholds: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(small("    evaluator", f"    confidence_thresholds: {thresholds}\n    evaluator"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("evaluator", "said"),
    [
        ("{name: numeric, field: scor}", "evaluator.field: output_schema has no field 'scor'; did you mean 'score'?"),
        ("{name: numeric, tolerence: 1.0}", "did you mean 'tolerance'"),
        ("{name: numeric, scale: '1'}", "setting 'scale'"),
        ("{name: custom}", "setting 'function'"),
        ("{fields: [why]}", "a mapping with `name`"),
        ("5", "a mapping with `name`"),
    ],
)
def test_settings_of_an_evaluator_are_checked(evaluator: str, said: str) -> None:
    text = small("    evaluator: structured_match\n    match_fields: [label]\n", f"    evaluator: {evaluator}\n")
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (
            "{input: {text: a}, output: {label: eggs, score: 1, why: b}}",
            "examples[0].output: label: 'eggs' is not one of",
        ),
        ("{input: {text: 5}, output: {label: ham, score: 1, why: b}}", "examples[0].input: text: should be str"),
        ("{input: {text: a}}", "examples[0]: should have `input` and `output`"),
    ],
)
def test_examples_fit_the_schemas(example: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task("    evaluator", f"    examples: [{example}]\n    evaluator")
    assert said in str(caught.value)


def test_two_tasks_of_one_name_are_refused() -> None:
    text = SMALL.replace("remote:", SMALL[SMALL.index("  - name") : SMALL.index("remote:")] + "remote:")
    with pytest.raises(ConfigError, match=r":8: tasks\[1\]\.name: there is another task named 'route'"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        small(new="store: &a {backend: sqlite}\nalerts: *a\n"),
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        small(new="local: !!python/object/apply:os.system ['touch /tmp/owned']\n"),
        small(new="local: !!python/name:os.system {}\n"),
        small(new="local: {base_model: !!binary aGk=}\n"),
        small(new="? [a, b]\n: c\n"),
        small(new="---\nremote: {}\n"),
        "[" * 5_000,
        "{a: " * 5_000,
        "a: 'never closed",
        "a: \x00",
        'a: "\\ud800"',
        '"\\ud800": a',
        "a: " + "9" * 5_000,
        "a: 1e999",
        "x" * 1_000_001,
        "- " * 3_000,
    ],
    ids=lambda text: text[-40:],
)
def test_a_hostile_file_is_refused_fast(text: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse(text, FILE)
    str(caught.value).encode()
    assert time.process_time() - started < 5


@given(st.text(alphabet=st.sampled_from("tasks:remote -{}[]?&*!'\"\n|>#,0.ax~"), max_size=60))
def test_any_text_loads_or_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00", b"a: \xe4", b"x" * 1_000_001])
def test_a_file_that_is_no_text_or_too_large_is_a_config_error(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        load(tmp_path / "a.yaml")


def test_a_file_that_is_not_there_is_a_config_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read") as caught:
        load(tmp_path / "nothing.yaml")
    assert "apprentice init" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load(tmp_path / "a.yaml").tasks[0].name == "route"


def test_a_file_that_runs_code_or_grows_a_billionfold_is_refused_without_doing_either(tmp_path: Path) -> None:  # F117
    owned = tmp_path / "owned"
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    tags = ["object/apply:os.system", "object/new:os.system", "object/apply:subprocess.check_output", "module:os"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in ("a0: &a0 [ha]\n" + laughs, *(small(new=f"local: !!python/{tag} ['touch {owned}']\n") for tag in tags)):
        with pytest.raises(ConfigError):
            parse(text, FILE)
    assert not owned.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_nothing_is_served_while_a_reference_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # F117
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "a.yaml").write_text(small(new="  base_url: https://${NOWHERE}/v1\n"))
    assert main(["serve", "--port", "0", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "NOWHERE" in capsys.readouterr().err


# --- secrets and the environment -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["  api_key: sk-very-secret-1", "  api_key_env: sk-very-secret-1", "  api_key: [sk-very-secret-1]"]
)
def test_a_key_in_the_file_is_refused_without_repeating_it(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(small(new=f"{line}\n"))
    assert "api_key_env" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_key_is_in_no_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-very-secret-1")
    config = parse(small(new="  api_key_env: SOME_KEY\nalerts: {webhooks: [SOME_KEY]}\n"))
    assert missing(config) == missing(parse(SMALL))
    assert "very-secret" not in repr(config) + config.model_dump_json() + "".join(missing(config))


def test_references_are_resolved_outside_of_what_is_said_to_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "models.example.com")
    text = small("Route a letter", "Fill in ${HOST}") + "  base_url: https://${HOST}/v1\n"
    config = parse(text)
    assert config.remote.base_url == "https://models.example.com/v1"
    assert config.tasks[0].description == "Fill in ${HOST}"


def test_a_reference_to_nothing_is_listed_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    lacking = missing(parse(small(new="  base_url: https://${NOWHERE}/v1\n")))
    assert any("NOWHERE" in line for line in lacking)


# --- what fits a task ------------------------------------------------------------------------------------------------


def test_a_value_that_fits_is_handed_back_as_it_is() -> None:
    value = {"text": "a", "title": None}
    assert task().validate_input(value) is value
    answer = {"label": "spam", "score": 1, "why": ""}
    assert task().validate_output(answer) is answer


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"text": 5}, "text: should be str, not int"),
        ({}, "text: is missing"),
        ({"text": "a", "titel": "b"}, "titel: unknown key; did you mean 'title'?"),
        ({"text": ""}, "text: is empty"),
        ({"text": " \n\t\u3000"}, "text: is empty"),
        ({"text": "a\ud800"}, "text: contains half a surrogate pair"),
        ({"text": float("nan")}, "text: nan is no number"),
        ("text", "should be dict, not str"),
        (None, "should be dict, not null"),
    ],
)
def test_an_input_that_does_not_fit_names_task_and_field(value: Json, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        task().validate_input(value)
    assert f"task 'route': input: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"label": "spam", "score": 1.0, "why": ""}, "score: should be int, not float"),
        ({"label": "Spam", "score": 1, "why": ""}, "label: 'Spam' is not one of spam, ham"),
        ({"label": "spam", "score": 1, "why": "\udfff"}, "why: contains half a surrogate pair"),
        ({"label": "spam", "score": 1, "why": "", "more": 1}, "more: unknown key"),
    ],
)
def test_an_output_that_does_not_fit_names_task_and_field(value: Json, said: str) -> None:
    with pytest.raises(InvalidAnswer) as caught:
        task().validate_output(value)
    assert f"task 'route': output: {said}" in str(caught.value)


def test_one_text_of_several_may_be_empty_and_a_task_without_text_has_none() -> None:
    both = task("{text: str, title: str?}", "{text: str, title: str}")
    both.validate_input({"text": "", "title": "x"})
    with pytest.raises(InvalidInput, match="text, title: is empty"):
        both.validate_input({"text": "", "title": " "})
    task("{text: str, title: str?}", "{n: int}").validate_input({"n": 0})


def test_a_megabyte_and_a_nul_pass_and_more_than_the_limit_does_not() -> None:
    task().validate_input({"text": "a" * 999_999 + "\0"})
    with pytest.raises(InvalidInput, match="max_input_bytes is 2,000,000"):
        task().validate_input({"text": "ä" * 1_000_001})
    limited = task("    evaluator", "    max_input_bytes: 20\n    evaluator")
    limited.validate_input({"text": "ääää"})
    with pytest.raises(InvalidInput, match="is 21 bytes"):
        limited.validate_input({"text": "ääääa"})


FULL = "{type: object, properties: {text: {type: string, maxLength: 3}}, required: [text]}"


def test_a_full_json_schema_is_checked_by_jsonschema() -> None:
    loaded = task("{text: str, title: str?}", FULL)
    assert loaded.validate_input({"text": "abc", "other": 1}) == {"text": "abc", "other": 1}
    with pytest.raises(InvalidInput, match="text: 'abcd' is too long"):
        loaded.validate_input({"text": "abcd"})
    with pytest.raises(InvalidInput, match="is empty"):
        loaded.validate_input({"text": ""})
    with pytest.raises(ConfigError, match=r"is no JSON Schema: properties\.text\.type"):
        task("{text: str, title: str?}", FULL.replace("type: string", "type: strin"))


def test_a_full_json_schema_loads_without_jsonschema_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name == "jsonschema" or name.startswith("jsonschema.")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.delitem(sys.modules, "apprentice.verifiers.schema", raising=False)
    config = parse(small("{text: str, title: str?}", FULL))
    assert any("apprentice[jsonschema]" in line for line in missing(config))
    with pytest.raises(MissingExtra, match="jsonschema"):
        config.tasks[0].validate_input({"text": "abc"})


def test_a_pydantic_model_is_a_schema() -> None:
    loaded = task("{text: str, title: str?}", "tests.test_schemas:Ticket")
    loaded.validate_input({"text": "a"})
    with pytest.raises(InvalidInput, match=r"day: should be a valid integer"):
        loaded.validate_input({"text": "a", "day": "5"})


# --- for trainers, editors and newcomers -----------------------------------------------------------------------------


def marked(old: str, new: str) -> list[str]:
    fields = task(old, new).learnable_task.output_schema["properties"]
    return [name for name, field in fields.items() if field.get("x-free-text")]


def test_free_text_is_what_no_exact_comparison_covers() -> None:
    compared = "    evaluator: structured_match\n    match_fields: [label]\n"
    assert marked("", "") == ["why"]
    assert marked(compared, "    evaluator: structured_match\n") == []
    assert marked(compared, "    evaluator: exact_match\n") == []
    assert marked(compared, "    evaluator: semantic_similarity\n") == ["why"]
    assert marked(compared, "    evaluator: {name: numeric, field: score}\n") == ["why"]
    assert "x-free-text" not in json.dumps(task().task.output_schema)


def test_editors_find_the_same_faults_as_we_do() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    editor = jsonschema.Draft202012Validator(schema)
    for text in (SEED, SMALL, small("{text: str, title: str?}", FULL), init_text("a", "b")):
        assert list(editor.iter_errors(read(text, "file")[0])) == []
    for text in (
        small("remote:", "remotes:"),
        small("score: int", "score: integr"),
        small(new="local: {learn: sometimes}\n"),
        small(new="sampling: {min_floor: 0}\n"),
        small("name: route", "name: ro/ute"),
        small("    description: Route a letter\n", ""),
        small(new="source: x\n"),
    ):
        assert not editor.is_valid(read(text, "file")[0]), text
    assert "NAME" in schema["$defs"]["Remote"]["properties"]["api_key_env"]["description"]


def test_the_first_configuration_says_what_was_asked_for() -> None:
    config = parse(init_text("route_mail", "Route it", input_schema="{text: str}", output_schema="{label: [spam, no]}"))
    assert config.task("route_mail").output_schema == {"label": ["spam", "no"]}
    assert config.remote.provider == "openai"
    assert config.local.backend == "embedded"
    anthropic = parse(init_text("a", "b", provider="anthropic")).remote
    assert (anthropic.model[:6], anthropic.api_key_env) == ("claude", "ANTHROPIC_API_KEY")


@given(
    st.text(min_size=1),
    st.dictionaries(st.text(min_size=1, max_size=8), st.sampled_from(["str", ["a", "no", "1e3"]]), min_size=1),
)
def test_any_description_and_field_name_can_be_asked_for(description: str, fields: dict[str, Any]) -> None:
    try:
        text = init_text("a", description, output_schema=json.dumps(fields, ensure_ascii=False))
    except ConfigError:
        return  # what YAML cannot carry, or a mapping that is a JSON Schema
    loaded = parse(text).tasks[0]
    assert (loaded.description, loaded.output_schema) == (description, fields)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"output_schema": "{label: wat}"}, "unknown type 'wat'"),
        ({"output_schema": "{label: [a"}, "output_schema"),
        ({"provider": "somebody"}, "somebody"),
        ({"name": "a b"}, "tasks[0].name"),
    ],
)
def test_a_first_configuration_that_would_not_load_is_not_written(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        init_text(**{"name": "a", "description": "b", **settings})
    assert said in str(caught.value)


@pytest.mark.parametrize("schedule", ["monthly", "quarterly", "every 30d", "every 9999d"])
def test_a_schedule_is_taken_as_it_is_written(schedule: str) -> None:
    text = init_text("a", "b").replace("  backend: embedded", f"  schedule: {schedule}\n  backend: embedded", 1)
    assert parse(text).local.schedule == schedule


@pytest.mark.parametrize("schedule", ["yearly", "every 0d", "every 30", "Monthly", "'every 30d '"])
def test_what_is_no_schedule_is_refused_with_its_field(schedule: str) -> None:
    text = init_text("a", "b").replace("  backend: embedded", f"  schedule: {schedule}\n  backend: embedded", 1)
    with pytest.raises(
        ConfigError, match=r"local\.schedule.*is no schedule such as 'monthly', 'quarterly' or 'every 30d'"
    ):
        parse(text)
