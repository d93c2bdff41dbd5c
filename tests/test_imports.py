"""Other tools' logs become Examples: the task's input and output, whose answer it was, and nothing twice."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice import cli, imports, plugins
from apprentice.config import Config, TaskConfig, parse
from apprentice.errors import ConfigError
from apprentice.importers import Imported
from apprentice.imports import Forecast, Found, Frame, Settings, Summary, Tally
from apprentice.report import report, status
from apprentice.types import Example, Json, Usage

from .conftest import YAML, right, texts

type Configured = Callable[..., Config]

TODAY = date(2026, 11, 21)
AT = 1_772_359_200.0  # 2026-03-01T10:00:00Z
TOLD: dict[str, Any] = {
    "model": "gpt-4o-mini",
    "provider": "openai@127.0.0.1",
    "at": AT,
}  # the remote of `configured`, which may teach


def task_of(input: Json, output: Json) -> TaskConfig:
    task = {"name": "sort", "description": "Sort it", "input_schema": input, "output_schema": output}
    config = parse(json.dumps({"tasks": [task], "remote": {"provider": "openai", "model": "gpt-4o-mini"}}))
    return config.tasks[0]


SORT = task_of({"text": "str"}, {"kind": ["fruit", "animal", "tool"]})


def one(task: TaskConfig, input: Json, output: Json, settings: Settings = Settings(), **told: Any) -> Found:  # noqa: B008
    [found] = imports.examples(task, [Imported(place="line 1", input=input, output=output, **told)], settings)
    return found


# --- what was asked and answered --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "output"),
    [
        ('{"text": "a pear"}', '{"kind": "fruit"}'),
        ({"text": "a pear"}, {"kind": "fruit"}),
        ("a pear", "fruit"),
        ("  a pear\n", '```json\n{"kind":"fruit"}\n```'),
        ('```\n{"text": "a pear"}\n```', ' {"kind": "fruit"} '),
    ],
)
def test_json_and_plain_text_become_what_the_task_has(input: Json, output: Json) -> None:
    found = one(SORT, input, output, **TOLD)
    assert found.example is not None
    assert (found.example.input, found.example.target) == ({"text": "a pear"}, {"kind": "fruit"})
    assert found.example.source == "remote"
    assert (found.example.model, found.example.teacher) == ("gpt-4o-mini", "openai@127.0.0.1")


def test_a_text_that_is_json_of_another_kind_stays_a_text() -> None:
    assert one(SORT, "17", "fruit").example == one(SORT, {"text": "17"}, "fruit").example
    assert one(SORT, '{"text": 3}', "fruit").example == one(SORT, {"text": '{"text": 3}'}, "fruit").example


def test_cells_become_numbers_where_the_task_has_numbers_and_answers_of_a_model_do_not() -> None:
    task = task_of({"text": "str", "age": "int?", "near": {"km": "float"}}, {"score": "int", "sure": "bool"})
    input, output = {"text": "12", "near": {"km": "1.5"}}, {"score": "3", "sure": "true"}
    found = one(task, input, output, cells=True)
    assert found.example is not None
    assert found.example.input == {"text": "12", "near": {"km": 1.5}}
    assert found.example.target == {"score": 3, "sure": True}
    assert one(task, {"text": "12", "near": {"km": 1.5}}, output).reason == "its answer does not fit the output schema"
    assert one(task, input | {"age": "old"}, output, cells=True).example is None


@pytest.mark.parametrize(
    ("input", "output", "reason", "detail"),
    [
        ({"subject": "x"}, {"kind": "fruit"}, "its prompt is no input of the task", "text: is missing"),
        ({"text": ""}, {"kind": "fruit"}, "its prompt is no input of the task", "empty"),
        ({"text": "a \ud800"}, {"kind": "fruit"}, "its prompt is no input of the task", "surrogate"),
        ("a pear", {"kind": "stone"}, "its answer does not fit the output schema", "'stone' is not one of fruit"),
        ("a pear", "I think it is a fruit.", "its answer does not fit the output schema", "kind"),
        ("a pear", '{"kind": NaN}', "its answer does not fit the output schema", ""),
        ("a pear", float("nan"), "its answer does not fit the output schema", ""),
        ("a pear", 10**400, "its answer does not fit the output schema", ""),
        (None, "fruit", "its prompt is no input of the task", ""),
    ],
)
def test_a_misfit_is_told_by_reason_with_its_field(input: Json, output: Json, reason: str, detail: str) -> None:
    found = one(SORT, input, output)
    assert found.example is None
    assert found.reason.startswith(reason)
    assert detail in found.detail


def test_a_dialogue_is_no_row_unless_its_turns_are_examples() -> None:
    assert "--few-shot" in one(SORT, "a pear", "fruit", turns=2).reason
    assert one(SORT, "a pear", "fruit", Settings(few_shot=True), turns=2).example is not None


# --- frames of prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "prompt", "fields"),
    [
        ("Sort: {text}", "Sort: a pear", {"text": "a pear"}),
        ("Sort: {text}", "\n Sort: a pear \n", {"text": "a pear"}),
        ("Sort: {text}\\nKind:", "Sort: a pear\nKind:", {"text": "a pear"}),
        ("{text}", "a {pear}", {"text": "a {pear}"}),
        ('Sort {{"text": "{text}"}}', 'Sort {"text": "a pear"}', {"text": "a pear"}),
        ("{a}-{b}", "1-2-3", {"a": "1", "b": "2-3"}),
        ("Sort: {text}", "Order: a pear", None),
        ("Sort: {text} now", "Sort: a pear", None),
        ("{a} and {b}", "no such word", None),
        ("Sort: {text}: tros", "Sort: tros", None),
    ],
)
def test_a_frame_gives_the_fields_of_a_prompt(pattern: str, prompt: str, fields: dict[str, str] | None) -> None:
    assert Frame(pattern).read(prompt) == fields


@pytest.mark.parametrize("pattern", ["Sort it", "{}", "{a}{b}", "{a} {a}", "{a", "a}"])
def test_a_pattern_that_is_no_frame_is_an_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="--input-pattern"):
        Frame(pattern)


@given(st.text(st.characters(exclude_characters="|\0"), min_size=1), st.text())
def test_a_frame_reads_what_it_framed(first: str, second: str) -> None:
    first, second = first.strip(), second.strip()
    assert Frame("<{a}|{b}>").read(f"<{first}|{second}>") == {"a": first, "b": second}


def test_a_frame_takes_no_longer_for_a_prompt_made_to_hold_it_up() -> None:
    assert Frame("{a}x{b}x{c}y").read("x" * 1_000_000) is None


def test_a_prompt_in_a_frame_becomes_the_input() -> None:
    found = one(SORT, "Say what it is: a pear!", "fruit", Settings(pattern="Say what it is: {text}!"))
    assert found.example is not None and found.example.input == {"text": "a pear"}
    assert "frame" in one(SORT, "a pear", "fruit", Settings(pattern="Say what it is: {text}!")).reason


# --- whose answer it was ----------------------------------------------------------------------------------------------


def test_what_a_row_does_not_tell_is_told_by_the_operator_and_nothing_else_is() -> None:
    settings = Settings(model="qwen3-32b", provider="vllm", at=5.0)
    told = one(SORT, "a pear", "fruit", settings).example
    assert told is not None and (told.model, told.teacher, told.at) == ("qwen3-32b", "vllm@", 5.0)
    own = one(SORT, "a pear", "fruit", settings, **TOLD).example
    assert own is not None and (own.model, own.teacher, own.at) == tuple(TOLD.values())


def test_gold_is_what_people_wrote_and_a_row_that_names_a_model_stays_its_answer() -> None:
    written = one(SORT, "a pear", "fruit", Settings(gold=True, model="gpt-4o")).example
    assert written is not None and (written.source, written.model, written.teacher) == ("gold", "", "")
    approved = one(SORT, "a pear", "fruit", Settings(gold=True), **TOLD).example
    assert approved is not None and (approved.source, approved.model) == ("gold", "gpt-4o-mini")


def tally_of(config: Config, found: Iterable[Found], known: Iterable[str] = ()) -> Tally:
    tally = Tally(config, config.task("sort"), known, TODAY)
    for row in found:
        tally.add(row)
    return tally


# --- nothing twice ----------------------------------------------------------------------------------------------------


def log(path: Path, n: int, *, seed: int = 0, wrong: int = 0, **more: Json) -> Path:
    """A file as LiteLLM writes it, with answers of the remote of `configured`, a row each hour; the first are wrong."""
    rows = [
        {
            "id": f"chatcmpl-{number}",
            "call_type": "acompletion",
            "status": "success",
            "custom_llm_provider": "openai",
            "model": "gpt-4o-mini",
            "api_base": "http://127.0.0.1:9/v1",
            "startTime": AT + 3600 * number,
            "response_cost": 0.001,
            "prompt_tokens": 40,
            "completion_tokens": 8,
            "messages": [{"role": "user", "content": json.dumps({"text": text})}],
            "response": {
                "choices": [
                    {
                        "finish_reason": "stop",
                        "message": {
                            "role": "assistant",
                            "content": json.dumps({"kind": "fruit" if number < wrong else right(text)}),
                        },
                    }
                ]
            },
        }
        | more
        for number, text in enumerate(texts(n, seed))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@asynccontextmanager
async def stored(config: Config) -> AsyncIterator[Any]:
    store = plugins.build("stores", "sqlite", path=config.store.path)
    try:
        yield store
    finally:
        await store.close()


async def brought(config: Config, *paths: Path, settings: Settings = Settings()) -> Summary:  # noqa: B008
    task = config.task("sort")
    async with stored(config) as store:
        rows = imports.read(plugins.build("importers", "litellm"), task, paths, settings)
        known = [example.request_id for example in await store.examples("sort")]
        return await imports.keep(store, task, rows, Tally(config, task, known, TODAY))


async def test_the_same_file_brings_nothing_twice_and_can_be_taken_back(configured: Configured, tmp_path: Path) -> None:
    config = configured()
    first, second = log(tmp_path / "a.jsonl", 60), log(tmp_path / "b.jsonl", 90)
    assert (await brought(config, first)).new == 60
    again = await brought(config, first, first)
    assert (again.rows, again.usable, again.new, again.may_train) == (120, 120, 0, 0)
    assert (await brought(config, second)).new == 30
    async with stored(config) as store:
        assert len(await store.examples("sort")) == 90
        rows = imports.read(plugins.build("importers", "litellm"), config.task("sort"), [first], Settings())
        assert await imports.take_back(store, config.task("sort"), rows) == 60
        left = await store.examples("sort")
    assert {row.input["text"] for row in left} == set(texts(90)) - set(texts(60))


async def test_a_second_answer_to_an_input_is_kept_beside_the_first(configured: Configured, tmp_path: Path) -> None:
    config = configured()
    assert (await brought(config, log(tmp_path / "a.jsonl", 30))).new == 30
    later = await brought(config, log(tmp_path / "b.jsonl", 30, wrong=30))
    assert later.new == sum(right(text) != "fruit" for text in texts(30))


PROGRAM = """
import asyncio, sys
from datetime import date
from pathlib import Path
from apprentice import config, imports, plugins

async def main():
    loaded = config.load(sys.argv[1])
    task = loaded.task("sort")
    store = plugins.build("stores", "sqlite", path=loaded.store.path)
    rows = imports.read(plugins.build("importers", "litellm"), task, [Path(sys.argv[2])], imports.Settings())
    await imports.keep(store, task, rows, imports.Tally(loaded, task, (), date(2026, 11, 21)))
    await store.close()

asyncio.run(main())
"""


async def test_killed_and_repeated_it_completes(configured: Configured, tmp_path: Path) -> None:
    file = tmp_path / "apprentice.yaml"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    config = configured()
    path = log(tmp_path / "a.jsonl", 3_000)
    seen: list[int] = []
    for wanted in (500, 1_500):
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, str(file), str(path))
        async with stored(config) as store:
            while await store.count_examples("sort") < wanted and process.returncode is None:
                await asyncio.sleep(0.01)
            process.kill()
            await process.wait()
            seen.append(await store.count_examples("sort"))
    assert seen == sorted(seen) and all(count % 500 == 0 for count in seen)
    summary = await brought(config, path)
    assert (summary.usable, summary.new) == (3_000, 3_000 - seen[-1])
    async with stored(config) as store:
        assert sorted(row.input["text"] for row in await store.examples("sort")) == sorted(texts(3_000))


async def test_what_was_imported_was_no_request_cost_nothing_and_is_evidence_of_nothing(
    configured: Configured, tmp_path: Path
) -> None:
    config = configured()
    async with stored(config) as store:
        before = [await report(config, store), await status(config, store, now=AT), await store.changes(0)]
        await brought(config, log(tmp_path / "a.jsonl", 60))
        after = [await report(config, store), await status(config, store, now=AT), await store.changes(0)]
        assert after == before
        assert await store.spending() == []
        assert await store.count("sort") == await store.count("sort", labelled=True) == 0


# --- what it would bring ----------------------------------------------------------------------------------------------


def test_a_summary_counts_rows_models_reasons_days_and_money(configured: Configured) -> None:
    config, task = configured(), configured().task("sort")
    rows = [
        Imported(
            place=f"line {number}",
            input=text,
            output=right(text),
            cost=2_000,
            **TOLD | {"at": AT + 6 * 3600 * number},
        )
        for number, text in enumerate(texts(9))
    ]
    rows += [
        Imported(
            place="line 10", input="a pear", output="fruit", model="claude-sonnet-4-5", provider="anthropic@", at=AT
        )
    ]
    rows += [
        rows[0],
        Imported(place="line 12", problem="is not JSON"),
        Imported(place="line 13", input="x", output="stone"),
    ]
    found = tally_of(config, imports.examples(task, rows, Settings())).summary()
    assert (found.rows, found.usable, found.new, found.inputs, found.may_train) == (13, 11, 10, 10, 9)
    assert [(line.model, line.rows, line.may_train) for line in found.lines] == [
        ("gpt-4o-mini", 9, True),
        ("claude-sonnet-4-5", 1, False),
    ]
    assert found.refused == {"is not JSON": 1, "its answer does not fit the output schema": 1}
    assert [text.split(":")[0] for text in found.shown] == ["line 12", "line 13"]
    assert (found.first, found.last) == (AT, AT + 48 * 3600)
    assert found.rows_a_day == pytest.approx(10 / 2)
    assert (found.cost, found.priced) == (2_000, 10)


def test_a_summary_stays_short_whatever_the_log_says(configured: Configured) -> None:
    config = configured()
    rows = [Imported(input=f"pear {n}", output="fruit", **TOLD | {"at": AT + 86_400 * n}) for n in range(400)]
    found = tally_of(config, imports.examples(config.task("sort"), rows, Settings())).summary()
    days = (TODAY - date(2026, 3, 1)).days + 1
    assert [(line.rows, line.reason) for line in found.lines] == [
        (days, ""),
        (400 - days, "the answer is dated later than today"),
    ]
    rows = [Imported(input=f"pear {n}", output="fruit", **TOLD | {"model": f"gpt-{n}"}) for n in range(400)]
    found = tally_of(config, imports.examples(config.task("sort"), rows, Settings())).summary()
    assert (len(found.lines), found.others, found.new, found.may_train) == (20, 380, 400, 400)


def test_the_price_comes_from_the_table_where_the_log_has_none() -> None:
    usage = Usage(input_tokens=1_000_000, output_tokens=100_000)
    told: dict[str, Any] = {"model": "gpt-4o-mini", "at": AT, "usage": usage}
    assert one(SORT, "a", "fruit", provider="openai@", **told).cost == pytest.approx(210_000)
    assert one(SORT, "a", "fruit", provider="openai@api.openai.com", **told).cost == pytest.approx(210_000)
    assert one(SORT, "a", "fruit", provider="openai@", cost=7, **told).cost == 7
    assert one(SORT, "a", "fruit", provider="openai@", **told | {"model": "nobody-knows-it"}).cost is None
    assert one(SORT, "a", "fruit", provider="vllm@", **told | {"usage": None}).cost is None


def test_a_sample_holds_one_answer_an_input_the_newest_and_does_not_depend_on_the_order(configured: Configured) -> None:
    config = configured()
    rows = [
        Imported(
            input=f"pear {number % 4_100}",
            output="fruit" if number < 4_100 else "tool",
            **TOLD | {"at": AT + number},
        )
        for number in range(8_200)
    ]
    found = list(imports.examples(config.task("sort"), rows, Settings()))
    sample = tally_of(config, found).sample()
    assert len(sample) == 2_000
    assert {row.target["kind"] for row in sample} == {"tool"}
    assert tally_of(config, found[::-1]).sample() == sample


async def predicted(config: Config, n: int, *, noisy: bool = False) -> tuple[Forecast, Summary]:
    task = config.task("sort")
    rows = [
        Imported(
            input=text,
            output="tool" if noisy and number % 2 else right(text),
            cost=1_000,
            **TOLD | {"at": AT + 864 * number},
        )
        for number, text in enumerate(texts(n))
    ]
    tally = tally_of(config, imports.examples(task, rows, Settings()))
    return await imports.forecast(config, task, tally.sample(), tally.summary(), today=TODAY), tally.summary()


async def test_a_first_student_is_asked_what_it_had_not_seen(configured: Configured) -> None:
    config = configured(local={"fine_tune_settings": {"encoder": "tfidf", "folds": 2}})
    found, summary = await predicted(config, 80)
    assert found.problem == "" and found.n == 80
    assert found.agreement is not None and found.lower is not None and found.upper is not None
    assert found.majority is not None and found.local_share is not None
    assert found.lower < found.agreement <= found.upper <= 1
    assert found.majority < 0.6 < 0.9 < found.agreement
    assert found.local_share > 0.9
    assert summary.rows_a_day is not None and summary.rows_a_day == pytest.approx(100, rel=0.01)
    expected = 30 * summary.rows_a_day * 1_000 * found.local_share * 0.95  # less the audits
    assert found.saving_a_month == pytest.approx(expected, abs=1)
    noisy, _ = await predicted(config, 80, noisy=True)
    assert noisy.agreement is not None and noisy.agreement < 0.8
    assert noisy.local_share is not None and noisy.local_share < found.local_share


async def test_rows_that_may_not_train_teach_no_student_not_even_to_try_it(configured: Configured) -> None:
    config = configured()
    rows = [
        Imported(input=text, output=right(text), model="claude-sonnet-4-5", provider="anthropic@", at=AT)
        for text in texts(60)
    ]
    tally = tally_of(config, imports.examples(config.task("sort"), rows, Settings()))
    assert tally.sample() == []
    found = await imports.forecast(config, config.task("sort"), [], tally.summary(), today=TODAY)
    assert found.agreement is None and "0 rows may train" in found.problem
    told: dict[str, Any] = {"source": "remote", "model": "claude-sonnet-4-5", "teacher": "anthropic@", "at": AT}
    smuggled = [Example(input=row.input, target=row.output, **told) for row in rows]
    found = await imports.forecast(config, config.task("sort"), smuggled, tally.summary(), today=TODAY)
    assert found.agreement is None and "0 rows may train" in found.problem


async def test_a_trainer_that_bills_is_not_tried(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREWORKS_API_KEY", "fw-test")
    settings = {"account": "acme", "model": "llama-v3p1-8b-instruct", "price_per_million": 0.5}
    config = configured(local={"fine_tune_backend": "fireworks", "fine_tune_settings": settings})
    found, _ = await predicted(config, 40)
    assert found.agreement is None and "costs money" in found.problem


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    file = tmp_path / "apprentice.yaml"
    file.write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))

    def command(*arguments: str | Path) -> tuple[int, str]:
        code = cli.main(["import", *map(str, arguments), "--task", "sort", "--config", str(file)])
        told = capsys.readouterr()
        return code, told.out + told.err

    return command


def test_a_dry_run_tells_all_and_changes_nothing(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = log(tmp_path / "spend.jsonl", 60)
    before = sorted(tmp_path.rglob("*"))
    code, text = run("--from", "litellm", path, "--dry-run", "--json")
    assert code == 0
    told = json.loads(text)
    assert (told["new"], told["may_train"], told["kept"]) == (60, 60, False)
    assert told["rows_a_day"] == pytest.approx(24)
    assert told["cost"] == 1_000
    assert told["forecast"]["agreement"] > 0.9
    assert sorted(tmp_path.rglob("*")) == before
    code, text = run("--from", "litellm", path, "--dry-run")
    assert code == 0, text
    assert "60 may train" in text and "agrees with" in text and "nothing was kept" in text


def test_it_keeps_what_it_tells(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = log(tmp_path / "spend.jsonl", 30)
    code, text = run("--from", "litellm", path)
    assert code == 0 and "30 Examples kept; `apprentice learn sort` teaches with them" in text
    assert "0 Examples kept" in run("--from", "litellm", path)[1]
    assert json.loads(run("--from", "litellm", path, "--dry-run", "--json")[1])["new"] == 0
    assert "30 Examples removed" in run("--from", "litellm", path, "--remove")[1]
    assert "30 Examples kept" in run("--from", "litellm", path)[1]


def test_a_table_of_peoples_answers_is_gold(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("mail;class\n" + "".join(f"{text};{right(text)}\n" for text in texts(20)))
    options = ("--from", "csv", path, "--map", "input.text=mail", "--map", "output.kind=class", "--delimiter", ";")
    told = json.loads(run(*options, "--gold", "--json")[1])
    assert (told["new"], told["may_train"]) == (20, 20)
    told = json.loads(run(*options, "--json")[1])
    assert (told["new"], told["may_train"]) == (20, 0)
    told = json.loads(
        run(*options, "--model", "gpt-4o-mini", "--provider", "openai@127.0.0.1", "--date", "2026-03-01", "--json")[1]
    )
    assert (told["new"], told["may_train"]) == (20, 20)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "litelm", "FILE"), "no importer named 'litelm'; did you mean 'litellm'?"),
        (("--from", "litellm", "FILE", "--map", "input.text=a"), "importer 'litellm' has no setting 'map'"),
        (("--from", "csv", "FILE", "--map", "text=a"), "there is no 'text'"),
        (("--from", "csv", "FILE", "--map", "input=a", "--map", "input.text=a"), "'input.text' is within 'input'"),
        (("--from", "litellm", "FILE", "--input-pattern", "Sort it"), "has no field"),
        (("--from", "litellm", "FILE", "--dry-run", "--remove"), "are two things"),
        (("--from", "openai-jsonl", "FILE", "--requests", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
    ],
)
def test_a_wrong_command_is_an_error_that_names_what_is_wrong(
    run: Callable[..., tuple[int, str]], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    path = log(tmp_path / "spend.jsonl", 3)
    code, text = run(*(str(path) if argument == "FILE" else argument for argument in arguments))
    assert (code, said in text) == (2, True), text


def test_a_file_that_is_missing_stops_before_the_first_row_is_kept(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = log(tmp_path / "spend.jsonl", 30)
    code, text = run("--from", "litellm", path, tmp_path / "missing.jsonl")
    assert code == 2 and "missing.jsonl: cannot be read" in text
    assert json.loads(run("--from", "litellm", path, "--json")[1])["new"] == 30


def test_a_log_does_nothing_to_the_terminal(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = log(tmp_path / "spend.jsonl", 3, model="\x1b[2Jdeep\u202eseek\nkept", wrong=0)
    code, text = run("--from", "litellm", path)
    assert code == 0
    assert "\x1b" not in text and "\u202e" not in text
    assert not [line for line in text.splitlines() if line.startswith("kept")]
