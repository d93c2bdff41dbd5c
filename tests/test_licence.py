"""The licence gate: a table of whose answers may train, what must hold for every case, and the proof of it."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, date, datetime, timedelta
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from apprentice import licence
from apprentice.errors import TrainingError
from apprentice.licence import (
    TABLE,
    Judged,
    Ruling,
    Sifted,
    Teacher,
    authored,
    check_proof,
    explain,
    gate,
    judge,
    proof,
    sift,
    strictest,
)
from apprentice.types import Example, Permission

TODAY = date(2026, 11, 21)
CONSENT = Permission(basis="letter of 1 March", by="R. Lee, counsel", date=date(2026, 3, 1), scope=("sort",))


def consent(**changes: object) -> Permission:
    return Permission.model_validate(CONSENT.model_dump() | changes)


@pytest.mark.parametrize(
    ("provider", "model", "host", "at", "permission", "may_train", "terms"),
    [
        # Services of closed models serve, and do not train.
        ("anthropic", "claude-sonnet-4-5-20250929", None, TODAY, None, False, "forbidden"),
        ("anthropic", "claude-3-haiku-20240307", None, date(2024, 5, 1), None, False, "unknown"),
        ("anthropic", "claude-opus-4", "127.0.0.1", TODAY, None, False, "forbidden"),
        ("openai", "gpt-4o", None, TODAY, None, False, "conditional"),
        ("openai", "gpt-4o-2024-08-06", None, date(2025, 12, 31), None, False, "forbidden"),
        ("openai", "gpt-4o-2024-08-06", None, date(2026, 1, 1), None, False, "conditional"),
        ("openai", "gpt-3.5-turbo", None, date(2022, 12, 1), None, False, "unknown"),
        ("openai", "gpt-4", "localhost", TODAY, None, False, "conditional"),
        ("openai", "o3-mini", None, TODAY, None, False, "conditional"),
        ("openai", "a-new-model", None, TODAY, None, False, "unknown"),
        ("openai", "gpt-4o", "my-company.openai.azure.com", TODAY, None, False, "forbidden"),
        ("google", "gemini-2.5-pro", None, TODAY, None, False, "forbidden"),
        ("google", "models/gemini-2.5-flash", None, TODAY, None, False, "forbidden"),
        ("google", "gemini-2.5-pro", "europe-west4-aiplatform.googleapis.com", TODAY, None, False, "forbidden"),
        ("openai", "grok-4", "api.x.ai", TODAY, None, False, "forbidden"),
        ("openai", "amazon.nova-pro-v1:0", "bedrock-runtime.eu-west-1.amazonaws.com", TODAY, None, False, "forbidden"),
        ("openai", "mistral-large-latest", "api.mistral.ai", TODAY, None, False, "conditional"),
        ("openai", "mistral-large-latest", "api.mistral.ai", date(2026, 9, 24), None, False, "unknown"),
        # A service whose terms allow it, from the day on which they did.
        ("openai", "deepseek-chat", "api.deepseek.com", TODAY, None, True, "permissive"),
        ("openai", "deepseek-chat", "api.deepseek.com", date(2025, 1, 20), None, True, "permissive"),
        ("openai", "deepseek-chat", "api.deepseek.com", date(2025, 1, 19), None, False, "unknown"),
        ("openai", "a-new-model", "api.deepseek.com", TODAY, None, False, "unknown"),
        # Open weights on a server of one's own: the licence of the weights alone.
        ("vllm", "Qwen/Qwen3-32B", None, TODAY, None, True, "permissive"),
        ("ollama", "qwen2.5:7b", None, TODAY, None, True, "permissive"),
        ("ollama", "qwen2.5:3b", None, TODAY, None, False, "conditional"),
        ("vllm", "Qwen/Qwen2.5-72B-Instruct", None, TODAY, None, False, "conditional"),
        ("vllm", "Qwen/Qwen2.5-Coder-32B-Instruct", None, TODAY, None, True, "permissive"),
        ("vllm", "Qwen/Qwen1.5-7B-Chat", None, TODAY, None, False, "forbidden"),
        ("vllm", "qwen3-max", None, TODAY, None, False, "unknown"),
        ("openai", "openai/gpt-oss-120b", "gpu.internal", TODAY, None, True, "permissive"),
        ("ollama", "gpt-oss:120b", None, TODAY, None, True, "permissive"),
        ("ollama", "gpt-oss:120b-cloud", None, TODAY, None, False, "unknown"),
        ("llama_cpp", "SmolLM2-1.7B-Instruct", None, TODAY, None, True, "permissive"),
        ("vllm", "deepseek-ai/DeepSeek-R1", None, TODAY, None, True, "permissive"),
        ("vllm", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", None, TODAY, None, False, "conditional"),
        ("ollama", "deepseek-r1:70b", None, TODAY, None, False, "conditional"),
        ("vllm", "deepseek-ai/DeepSeek-V3", None, TODAY, None, False, "conditional"),
        ("vllm", "deepseek-ai/DeepSeek-V3.2", None, TODAY, None, True, "permissive"),
        ("vllm", "meta-llama/Llama-2-7b-chat-hf", None, TODAY, None, False, "forbidden"),
        ("vllm", "meta-llama/Meta-Llama-3-8B-Instruct", None, TODAY, None, False, "forbidden"),
        ("ollama", "llama3:8b", None, TODAY, None, False, "forbidden"),
        ("ollama", "llama3.1:8b", None, TODAY, None, False, "conditional"),
        ("vllm", "meta-llama/Llama-3.3-70B-Instruct", None, TODAY, None, False, "conditional"),
        ("vllm", "google/gemma-3-27b-it", None, TODAY, None, False, "conditional"),
        ("vllm", "google/gemma-4-31B-it", None, TODAY, None, True, "permissive"),
        ("google", "gemma-4-31b-it", None, TODAY, None, False, "forbidden"),
        ("ollama", "mistral:7b", None, TODAY, None, True, "permissive"),
        ("ollama", "mixtral:8x7b", None, TODAY, None, True, "permissive"),
        ("vllm", "mistralai/Mistral-Large-Instruct-2411", None, TODAY, None, False, "conditional"),
        ("vllm", "microsoft/phi-4", None, TODAY, None, True, "permissive"),
        ("vllm", "allenai/OLMo-2-1124-7B-Instruct", None, TODAY, None, True, "permissive"),
        ("vllm", "ibm-granite/granite-3.3-8b-instruct", None, TODAY, None, True, "permissive"),
        ("vllm", "CohereLabs/c4ai-command-r-plus", None, TODAY, None, False, "conditional"),
        ("vllm", "tiiuae/falcon-40b", None, TODAY, None, True, "permissive"),
        ("vllm", "tiiuae/Falcon3-10B-Instruct", None, TODAY, None, False, "unknown"),
        ("vllm", "01-ai/Yi-1.5-34B-Chat", None, TODAY, None, True, "permissive"),
        ("vllm", "zai-org/GLM-4.5", None, TODAY, None, True, "permissive"),
        ("vllm", "moonshotai/Kimi-K2-Instruct", None, TODAY, None, False, "conditional"),
        ("vllm", "MiniMaxAI/MiniMax-M3", None, TODAY, None, False, "conditional"),
        ("vllm", "xai-org/grok-2", None, TODAY, None, False, "forbidden"),
        # Weights of an unknown licence, republished ones, and names that tell nothing.
        ("vllm", "acme/Qwen3-32B-tuned", None, TODAY, None, False, "unknown"),
        ("vllm", "our-model", None, TODAY, None, False, "unknown"),
        ("vllm", "", None, TODAY, None, False, "unknown"),
        ("recorded", "Qwen/Qwen3-32B", None, TODAY, None, False, "unknown"),
        # The same weights at a service of others: its terms count as well, and unknown is no.
        ("openai", "Qwen/Qwen3-32B", "api.together.xyz", TODAY, None, False, "unknown"),
        ("openai", "meta-llama/Llama-3.3-70B-Instruct", "api.together.xyz", TODAY, None, False, "unknown"),
        ("openai", "openai/gpt-oss-120b", "api.groq.com", TODAY, None, False, "unknown"),
        ("openai", "qwen/qwen3-32b", "openrouter.ai", TODAY, None, False, "conditional"),
        ("openai", "anthropic/claude-sonnet-4.5", "openrouter.ai", TODAY, None, False, "forbidden"),
        ("openai", "Qwen/Qwen3-32B", "llm.example.com", TODAY, None, False, "unknown"),
        ("openai", "Qwen/Qwen3-32B", "203.0.113.9.example.com", TODAY, None, False, "unknown"),
        ("openai", "Qwen/Qwen3-32B", "8.8.8.8", TODAY, None, False, "unknown"),
        ("openai", "Qwen/Qwen3-32B", "10.1.2.3", TODAY, None, True, "permissive"),
        ("openai", "Qwen/Qwen3-32B", "[::1]", TODAY, None, True, "permissive"),
        # A permission opens what it is for, on the days on which it holds.
        ("anthropic", "claude-sonnet-4-5", None, TODAY, CONSENT, True, "forbidden"),
        ("openai", "gpt-4o", None, TODAY, CONSENT, True, "conditional"),
        ("openai", "gpt-4", "127.0.0.1", date(2023, 10, 1), CONSENT, True, "forbidden"),
        ("openai", "Qwen/Qwen3-32B", "llm.example.com", TODAY, CONSENT, True, "unknown"),
        ("anthropic", "claude-sonnet-4-5", None, TODAY, consent(scope="*"), True, "forbidden"),
        ("anthropic", "claude-sonnet-4-5", None, TODAY, consent(scope=("rank",)), False, "forbidden"),
        ("anthropic", "claude-sonnet-4-5", None, TODAY, consent(date=TODAY + timedelta(1)), False, "forbidden"),
        ("anthropic", "claude-sonnet-4-5", None, TODAY, consent(date=TODAY), True, "forbidden"),
        ("anthropic", "claude-sonnet-4-5", None, TODAY, consent(until=TODAY), True, "forbidden"),
        ("anthropic", "claude-sonnet-4-5", None, TODAY, consent(until=TODAY - timedelta(1)), False, "forbidden"),
        # An answer of tomorrow is nobody's.
        ("vllm", "Qwen/Qwen3-32B", None, TODAY + timedelta(1), None, False, "permissive"),
        ("anthropic", "claude-sonnet-4-5", None, TODAY + timedelta(1), CONSENT, False, "forbidden"),
    ],
)
def test_whose_answers_may_train(
    provider: str,
    model: str,
    host: str | None,
    at: date,
    permission: Permission | None,
    may_train: bool,
    terms: str,
) -> None:
    ruling = gate(provider, model, host, at, task="sort", permission=permission, today=TODAY)
    assert (ruling.may_train, ruling.terms) == (may_train, terms), ruling
    assert bool(ruling.basis) == may_train
    assert bool(ruling.reason and ruling.fix) == (not may_train)


# --- what holds for every case ----------------------------------------------------------------------------------------

models = st.one_of(
    st.sampled_from([name.replace("*", end) for row in TABLE for name in row.models for end in ("", "-8b", "x")]),
    st.text("qwenlamgpt-345.:/", max_size=12),
)
hosts = st.one_of(
    st.none(),
    st.sampled_from(["127.0.0.1", "box", "llm.example.com"]),
    st.sampled_from([host.replace("*", "eu") for row in TABLE for host in row.hosts]),
)
providers = st.sampled_from(["anthropic", "google", "openai", "ollama", "vllm", "recorded", "elsewhere"])
days = st.dates(date(2022, 1, 1), TODAY)


@given(providers, models, hosts, days)
def test_only_permissive_terms_train_by_themselves(provider: str, model: str, host: str | None, at: date) -> None:
    ruling = gate(provider, model, host, at, task="sort", today=TODAY)
    assert ruling.may_train == (ruling.terms == "permissive")
    assert ("checked 20" in ruling.basis) == ruling.may_train


@given(st.text(max_size=20), st.sampled_from(["api.acme.ai", "example.org", "8.8.8.8"]), days)
def test_what_is_unknown_never_trains(model: str, host: str, at: date) -> None:
    assert not gate("openai", model, host, at, task="sort", today=TODAY).may_train


@given(providers, models, hosts, days, st.text(min_size=1, max_size=8).filter(str.strip))
def test_a_permission_of_another_scope_changes_nothing_but_the_reason(
    provider: str, model: str, host: str | None, at: date, other: str
) -> None:
    without = gate(provider, model, host, at, task="sort", today=TODAY)
    with_it = gate(provider, model, host, at, task="sort", permission=consent(scope=("not " + other,)), today=TODAY)
    assert with_it.model_copy(update={"reason": without.reason}) == without


@given(providers, models, hosts, days)
def test_a_permission_never_closes_what_was_open_and_says_what_it_opened(
    provider: str, model: str, host: str | None, at: date
) -> None:
    without = gate(provider, model, host, at, task="sort", today=TODAY)
    with_it = gate(provider, model, host, at, task="sort", permission=CONSENT, today=TODAY)
    assert with_it.may_train
    assert with_it.terms == without.terms
    if without.may_train:
        assert with_it == without  # what needs no permission rests on the terms
    else:
        assert "R. Lee" in with_it.basis
        assert without.reason in with_it.basis


@given(models, days)
def test_a_service_of_others_never_opens_what_the_weights_close(model: str, at: date) -> None:
    own = gate("vllm", model, None, at, task="sort", today=TODAY)
    for host in ("api.together.xyz", "openrouter.ai", "api.groq.com", "llm.example.com"):
        elsewhere = gate("openai", model, host, at, task="sort", today=TODAY)
        assert own.may_train or not elsewhere.may_train


@given(st.permutations([(name, row) for row in TABLE for name in row.models]), models, days)
def test_the_order_of_the_table_decides_nothing(
    patterns: list[tuple[str, licence.Terms]], model: str, at: date
) -> None:
    name = licence._plain(model)[1]
    assert licence._most_specific(patterns, name, at) == licence._most_specific(sorted(patterns, key=str), name, at)


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_row_has_a_source_a_date_and_something_that_it_governs(row: licence.Terms) -> None:
    assert row.source.startswith("https://")
    assert date(2026, 1, 1) <= row.checked <= TODAY
    assert row.hosts or row.models
    assert row.makers or not row.models
    assert row.terms in ("permissive", "unknown") or row.conditions, "what it says belongs there"
    assert row.terms != "unknown" or row.note, "why it is not known belongs there"
    assert all(name == name.lower() and not set(name) & set(":_@/") for name in row.models), "as names are compared"


def test_names_of_rows_are_unlike() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)


@cache
def _meet(one: str, other: str) -> bool:
    """Whether some name fits both patterns."""
    if not one or not other:
        return not (one + other).strip("*")
    if one[0] == "*":
        return _meet(one[1:], other) or _meet(one, other[1:])
    if other[0] == "*":
        return _meet(other, one)
    return one[0] == other[0] and _meet(one[1:], other[1:])


@pytest.mark.parametrize("of", ["hosts", "models"])
def test_no_name_fits_a_row_that_trains_and_one_that_does_not_equally_well(of: str) -> None:
    for one, other in itertools.product((r for r in TABLE if r.terms == "permissive"), TABLE):
        for a, b in itertools.product(getattr(one, of), getattr(other, of) if other.terms != "permissive" else ()):
            equal = len(a.replace("*", "")) == len(b.replace("*", ""))
            assert not equal or not _meet(a, b), (one.name, a, other.name, b)


def test_rows_for_the_same_names_follow_each_other_without_a_gap_or_an_overlap() -> None:
    for one, other in itertools.combinations(TABLE, 2):
        if {*one.hosts, *one.models} & {*other.hosts, *other.models}:
            assert one.until == other.since or other.until == one.since, (one.name, other.name)


def test_the_version_of_the_table_tells_its_age() -> None:
    day, _, digest = licence.version().partition("/")
    assert date.fromisoformat(day) == max(row.checked for row in TABLE)
    assert len(digest) == 12


# --- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", ["basis", "by", "date", "scope"])
def test_a_permission_has_to_be_complete(lacks: str) -> None:
    whole = CONSENT.model_dump(mode="json")
    with pytest.raises(ValidationError, match=lacks):
        Permission.model_validate_json(json.dumps({key: value for key, value in whole.items() if key != lacks}))
    with pytest.raises(ValidationError, match=lacks):
        Permission.model_validate_json(json.dumps(whole | {lacks: [] if lacks == "scope" else "  "}))


def test_a_permission_is_read_as_it_is_written_in_a_configuration() -> None:
    written = '{"basis": "contract 7", "by": "ops", "date": "2026-11-01", "scope": "*"}'
    read = Permission.model_validate_json(written, strict=True)
    assert read.scope == ("*",)
    assert read.text() == "permission by ops of 2026-11-01 for *: contract 7"


# --- rows -------------------------------------------------------------------------------------------------------------

AT = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
QWEN = Teacher("teacher", "vllm", "Qwen/Qwen3-32B")
CLAUDE = Teacher("remote", "anthropic", "claude-sonnet-4-5")


def row(source: str = "remote", *, model: str = "claude-sonnet-4-5", target: str = "spam", **more: object) -> Example:
    values = {"input": "hello", "target": target, "source": source, "model": model, "at": AT, "request_id": "r1"}
    return Example.model_validate(values | more)


def rule(example: Example) -> Ruling:
    teacher = {"claude-sonnet-4-5": CLAUDE, "Qwen/Qwen3-32B": QWEN}.get(example.model)
    return judge(example, teacher, task="sort", today=TODAY)


@pytest.mark.parametrize(
    ("example", "may_train", "terms"),
    [
        (row("gold", model=""), True, "own"),  # a person's label, or correction
        (row("gold"), False, "forbidden"),  # a person approved the model's answer: still the model's
        (row("gold", model="Qwen/Qwen3-32B"), True, "permissive"),
        (row("remote"), False, "forbidden"),
        (row("teacher", model="Qwen/Qwen3-32B"), True, "permissive"),
        (row("teacher", model=""), False, "unknown"),
        (row("remote", model="from-a-log"), False, "unknown"),
        (row("teacher", model="Qwen/Qwen3-32B", at=1e300), False, "unknown"),
        (row("teacher", model="Qwen/Qwen3-32B", at=0.0), False, "unknown"),
    ],
)
def test_a_row_is_judged_by_who_made_its_target(example: Example, may_train: bool, terms: str) -> None:
    ruling = rule(example)
    assert (ruling.may_train, ruling.terms) == (may_train, terms)
    assert bool(ruling.reason and ruling.fix) == (not may_train)


@pytest.mark.parametrize(
    ("target", "answer", "own"),
    [
        ({"label": "ham"}, {"label": "spam"}, True),
        ({"label": "spam"}, {"label": "spam"}, False),
        ({"label": " Spam"}, {"label": "spam"}, False),
        (["a b"], ["A  B"], False),
        ({"n": 1}, {"n": 2}, True),
        ({"a": 1}, {"a": 1, "b": 2}, True),
    ],
)
def test_approval_and_other_spacing_are_no_authorship(target: object, answer: object, own: bool) -> None:
    assert authored(target, answer) is own


def test_admitted_rows_carry_their_basis_and_refused_ones_are_counted_by_reason() -> None:
    rows = [row(target=str(i)) for i in range(3)] + [row("gold", model="", target="ham"), row(model="?", target="x")]
    found = sift(rows, rule)
    assert [example.basis for example in found.examples] == ["a person's own words"]
    assert [example.target for example in found.examples] == ["ham"]
    assert list(found.reasons.values()) == [3, 1]
    assert next(iter(found.reasons)) == "forbidden by Anthropic Commercial Terms and Usage Policy"


@pytest.mark.parametrize(
    ("other", "admitted"),
    [
        (row("teacher", model="Qwen/Qwen3-32B", request_id="r2"), True),  # another answer to another request
        (row("teacher", model="Qwen/Qwen3-32B"), True),  # another model's answer to the same request
        (row("teacher", model="Qwen/Qwen3-32B", request_id=None, input=" Hello"), False),
        (row("teacher", model="Qwen/Qwen3-32B", request_id=None), False),  # which answer this is nobody can tell
        (row("gold", model="", request_id=None), True),  # a person's label stands by itself
        (row("teacher", model="Qwen/Qwen3-32B", request_id=None, target="ham"), True),  # no duplicate
    ],
)
def test_one_answer_under_two_licences_is_out_wherever_it_stands(other: Example, admitted: bool) -> None:
    closed = row()
    for rows in ([closed, other], [other, closed]):
        found = sift(rows, rule)
        assert [r.example.model for r in found.admitted] == ([other.model] if admitted else [])
        assert sum(found.reasons.values()) == 2 - admitted


def test_one_answer_recorded_twice_under_different_terms_is_out() -> None:
    twice = [row("teacher", model="Qwen/Qwen3-32B"), row("teacher", model="Qwen/Qwen3-32B", at=AT + 10 * 86400)]
    assert not sift(twice, rule).admitted


@given(
    st.lists(
        st.builds(
            row,
            st.sampled_from(["gold", "teacher", "remote"]),
            model=st.sampled_from(["", "claude-sonnet-4-5", "Qwen/Qwen3-32B", "?"]),
            target=st.sampled_from(["a", "b"]),
            request_id=st.sampled_from([None, "r1", "r2"]),
        ),
        max_size=12,
    )
)
def test_a_refused_row_more_never_admits_another(rows: list[Example]) -> None:
    def admitted(some: list[Example]) -> list[Example]:
        return [example.model_copy(update={"basis": ""}) for example in sift(some, rule).examples]

    found = sift(rows, rule)
    assert len(found.admitted) + len(found.refused) == len(rows)
    assert all(ruling.may_train and example.basis == ruling.basis for example, ruling in found.admitted)
    assert all(not ruling.may_train and not ruling.basis for _, ruling in found.refused)
    fewer = admitted([*rows, row()])
    assert all(example in admitted(rows) for example in fewer)


def test_a_row_of_unknown_origin_says_what_is_missing() -> None:
    ruling = judge(row("teacher", model="", at=0.0), None, task="sort", today=TODAY)
    assert ruling.reason == "nobody recorded when and where and by which model it was answered"


def test_where_several_may_have_answered_the_strictest_decides() -> None:
    rulings = [judge(row(model=t.model), t, task="sort", today=TODAY) for t in (QWEN, CLAUDE)]
    assert strictest(rulings).terms == "forbidden"
    assert strictest(rulings[:1]).may_train


# --- the proof --------------------------------------------------------------------------------------------------------


def selected(n: int = 4) -> list[Example]:
    return [row("teacher", model="Qwen/Qwen3-32B", input=f"text {i}") for i in range(n)] + [
        row(),
        row("gold", model=""),
    ]


def test_the_proof_counts_teachers_and_bases_and_survives_json() -> None:
    found = sift(selected(), rule)
    proven = json.loads(json.dumps(proof(found, today=TODAY)))
    assert proven["rows"] == 5
    assert [(group["teacher"], group["terms"], group["rows"]) for group in proven["by"]] == [
        ("a person", "own", 1),
        ("vllm@own server", "permissive", 4),
    ]
    assert sum(proven["refused"].values()) == 1
    assert proven["table"] == licence.version()
    check_proof(proven, found)


@given(st.permutations(selected()))
def test_the_order_of_rows_is_no_change(rows: list[Example]) -> None:
    check_proof(proof(sift(selected(), rule), today=TODAY), sift(rows, rule))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (selected(3), "4 -> 3"),
        (selected(5), "4 -> 5"),
        (
            [row("teacher", model="Qwen/Qwen3-32B", input=f"text {i}", target="x") for i in range(4)] + selected(0),
            "altered",
        ),
        ([*selected()[:-1]], "1 -> 0"),
    ],
)
def test_a_row_that_came_went_or_changed_stops_the_job(rows: list[Example], says: str) -> None:
    proven = proof(sift(selected(), rule), today=TODAY)
    with pytest.raises(TrainingError, match=says):
        check_proof(proven, sift(rows, rule))


def test_a_permission_that_ended_between_selection_and_start_stops_the_job() -> None:
    allowed = CLAUDE._replace(permission=consent(until=TODAY))

    def on(day: date) -> Sifted:
        return sift([row()], lambda example: judge(example, allowed, task="sort", today=day))

    proven = proof(on(TODAY), today=TODAY)
    assert proven["rows"] == 1
    with pytest.raises(TrainingError, match="ended on 2026-11-21") as raised:
        check_proof(proven, on(TODAY + timedelta(1)))
    assert "apprentice licence" in str(raised.value.hint)


def test_terms_that_changed_between_selection_and_start_stop_the_job() -> None:
    found = sift([row("teacher", model="Qwen/Qwen3-32B")], rule)
    example, ruling = found.admitted[0]
    reworded = Sifted((Judged(example, ruling.model_copy(update={"basis": "Apache-3.0"})),), ())
    with pytest.raises(TrainingError, match=r"Apache-3\.0"):
        check_proof(proof(found, today=TODAY), reworded)


# --- what a configuration means ---------------------------------------------------------------------------------------


def test_two_closed_remotes_serve_and_do_not_train_until_a_permission_or_a_teacher_is_named() -> None:
    remotes = [Teacher("remote", "anthropic", "claude-sonnet-4-5-20250929"), Teacher("additional", "openai", "gpt-4o")]
    for line in explain(remotes, ["sort"], today=TODAY):
        assert line.trains == ()
        assert line.refused == ("sort",)
        assert "permission" in line.ruling.fix
        assert "teacher" in line.ruling.fix
        assert line.ruling.conditions
        assert line.ruling.sources
    opened = explain([remotes[0]._replace(permission=CONSENT), QWEN], ["sort", "rank"], today=TODAY)
    assert [(line.trains, line.refused) for line in opened] == [(("sort",), ("rank",)), (("sort", "rank"), ())]
    assert "is for sort" in opened[0].ruling.reason


def test_a_configuration_without_tasks_has_nothing_to_explain() -> None:
    with pytest.raises(ValueError, match="task"):
        explain([QWEN], [], today=TODAY)
