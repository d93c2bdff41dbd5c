from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest

from apprentice import cli, dialogues, feedback, plugins
from apprentice.config import Config, TaskConfig, missing, parse
from apprentice.errors import ConfigError
from apprentice.learn import examined, learn
from apprentice.promotion import fingerprint, held_out
from apprentice.selection import BETWEEN, benchmarks, choose, frozen_rows, gold, key_of, lawful, select
from apprentice.types import Answer, Correction, Decision, Example, Json, Record, Score, Store, Version

from .conftest import YAML, right, texts

Configured = Callable[..., Config]


def answered(number: int, text: str, kind: str | None = None) -> Record:
    return Record(
        request_id=f"r{number}",
        task="sort",
        at=1.0 + number,
        input={"text": text},
        decision=Decision(route="remote", reason="no_local_model", p=0.0),
        remote=Answer(output={"kind": kind or right(text)}, model="gpt"),
        served="remote",
    )


def recorded(said: list[str]) -> list[tuple[int, Record]]:
    return [(n, answered(n, text)) for n, text in enumerate(said)]


def on_side(said: list[str], *, held: bool) -> str:
    return next(text for text in said if held_out(fingerprint({"text": text})) == held)


def told(rows: list[Example]) -> set[str]:
    return {row.input["text"] for row in rows}


LONG = " and ".join(f"the blue box of {word} in room {n}" for n, word in enumerate(["paper", "glass", "wood", "iron"]))


@pytest.mark.parametrize("held", [True, False])
def test_a_near_duplicate_goes_where_the_first_one_went(held: bool) -> None:
    said = texts(120)
    first = on_side([f"{LONG}, pear {n}" for n in range(99)], held=held)
    copies = [f"{first} please", f"Please: {first}!", first.replace("the blue", "blue", 1)]
    found = select(recorded([*said, first, *copies]))
    assert {first, *copies} <= told(found.held_out if held else found.training)
    assert found.left_out == {}


def test_a_row_near_both_sides_is_on_neither_and_is_counted() -> None:
    middle = " ".join(f"x{n}" for n in range(12))
    trained = on_side([f"pear pear{n} {middle}" for n in range(40)], held=False)
    held = on_side([f"{middle} plum plum{n}" for n in range(40)], held=True)
    found = select((n, answered(n, text, "fruit")) for n, text in enumerate([trained, held, middle]))
    assert (told(found.training), told(found.held_out), found.left_out) == ({trained}, {held}, {BETWEEN: 1})


def test_what_was_on_a_side_stays_there_as_answers_and_words_come_in() -> None:
    dice = Random(2)
    said = texts(300)
    said = [
        f"{text} {text2}" if dice.random() < 0.3 else text for text, text2 in zip(said, [*said[1:], "x"], strict=True)
    ]
    records = recorded(said)
    word = Correction(request_id="r7", task="sort", at=150.5, action="corrected", target={"kind": "tool"})
    silent = records[7][1].model_copy(update={"remote": None})
    before = select([*records[:7], *records[8:150]])
    after = select([*records[:7], *records[8:]], [(silent, word)])
    assert told(before.training) <= told(after.training) and told(before.held_out) <= told(after.held_out)
    assert [row.source for row in after.training + after.held_out if row.request_id == "r7"] == ["gold"]


def test_the_frozen_hold_out_fills_up_and_then_stays_whatever_is_erased_or_corrected() -> None:
    records = recorded(texts(400))
    small = select(records[:60], freeze=20)
    assert list(small.frozen) == [key_of(row) for row in small.held_out] and len(small.frozen) < 20
    full = select(records, freeze=20, frozen=small.frozen)
    assert len(full.frozen) == 20 and full.frozen[: len(small.frozen)] == small.frozen
    assert full.frozen == select(records, freeze=20).frozen  # the same without anything that was kept
    gone = next(record for _, record in records if fingerprint(record.input)[:16] == full.frozen[3])
    word = Correction(request_id="r9", task="sort", at=999.0, action="corrected", target={"kind": "tool"})
    erased = [(n, record) for n, record in records if record is not gone]
    later = select(erased, [(records[9][1], word)], freeze=20, frozen=full.frozen)
    assert later.frozen == full.frozen
    assert len([row for row in later.held_out if key_of(row) in full.frozen]) == 19


def test_a_frozen_row_is_held_out_even_where_its_near_duplicate_came_first() -> None:
    said = texts(100)
    first = on_side([f"{LONG}, pear {n}" for n in range(99)], held=False)
    copy = f"{first} please"
    frozen = (fingerprint({"text": copy})[:16],)
    found = select(recorded([*said, first, copy]), frozen=frozen, freeze=10)
    assert {first, copy} <= told(found.held_out)
    assert not {first, copy} & told(found.training)


def test_the_rolling_hold_out_is_the_newest_and_the_frozen_one_the_oldest_rows() -> None:
    found = select(recorded(texts(400)), freeze=10)
    examples, rolling, frozen = examined(found, 15)
    held = found.held_out
    assert [examples[row] for row in rolling] == held[-15:] and [examples[row] for row in frozen] == held[:10]
    assert len(examples) == 25
    everything, rolling, frozen = examined(found, 1000)
    assert (everything, len(rolling), len(frozen)) == (held, len(held), 10)


# --- rejected answers


def both(local: Json, remote: Json, score: Score | None) -> Record:
    """Answered by both, about a text that is in training."""
    text = on_side(texts(30), held=False)
    record = answered(1, text)
    told = {
        "local": Answer(output=local, model="student"),
        "remote": Answer(output=remote, model="gpt"),
        "score": score,
    }
    return record.model_copy(update=told)


BILL, SPAM, HAM = {"kind": "bill", "sure": True}, {"kind": "spam", "sure": True}, {"kind": "ham", "sure": True}


@pytest.mark.parametrize(
    ("record", "rejected"),
    [
        (both(SPAM, BILL, Score(value=0.0)), SPAM),
        (both(SPAM, BILL, Score(value=0.49)), SPAM),
        (both(SPAM, BILL, Score(value=0.5)), None),  # more right than wrong
        (both(SPAM, BILL, Score(value=0.9, fields={"kind": 0.0, "sure": 1.0})), SPAM),  # one field is wrong
        (both(SPAM, BILL, Score(value=0.9, fields={"kind": 0.8, "sure": 1.0})), None),
        (both(SPAM, BILL, None), None),  # nobody judged it
        (both(BILL, BILL, Score(value=0.0)), None),
        (both({"kind": " Bill", "sure": True}, BILL, Score(value=0.0)), None),  # the same words
        (both(None, BILL, Score(value=0.0)), None),  # it fitted no schema: there is nothing to reject
        (both(SPAM, BILL, Score(value=0.0)).model_copy(update={"local": None}), None),
    ],
)
def test_a_local_answer_is_rejected_where_it_was_scored_as_wrong_beside_the_remotes(
    record: Record, rejected: Json
) -> None:
    [row] = select([(1, record)]).training
    assert (row.target, row.rejected) == (BILL, rejected)


@pytest.mark.parametrize(
    ("record", "action", "target", "rejected"),
    [
        (both(SPAM, BILL, Score(value=0.0)), "corrected", HAM, SPAM),
        (both(BILL, BILL, Score(value=1.0)), "corrected", HAM, BILL),  # both were wrong
        (both(SPAM, BILL, None), "corrected", HAM, SPAM),  # a person is judge enough
        (both(HAM, BILL, Score(value=0.0)), "corrected", HAM, None),  # the local answer was right all along
        (both(SPAM, BILL, Score(value=0.0)), "approved", BILL, SPAM),
        (both(SPAM, BILL, Score(value=0.8)), "approved", BILL, None),
        (both(SPAM, None, None).model_copy(update={"remote": None, "served": "local"}), "corrected", BILL, SPAM),
        (both(SPAM, None, None).model_copy(update={"remote": None, "served": "local"}), "approved", SPAM, None),
    ],
)
def test_a_persons_word_rejects_the_local_answer_that_it_corrects(
    record: Record, action: Literal["corrected", "approved"], target: Json, rejected: Json
) -> None:
    word = Correction(request_id="r1", task="sort", at=9.0, action=action, target=target)
    [row] = select([(1, record)], [(record, word)]).training
    assert (row.source, row.target, row.rejected) == ("gold", target, rejected)


def test_what_the_local_model_got_right_since_is_no_longer_held_against_it() -> None:
    wrong = both(SPAM, BILL, Score(value=0.0))
    right_now = both(BILL, BILL, Score(value=1.0)).model_copy(update={"request_id": "r2", "at": 3.0})
    [row] = select([(1, wrong), (2, right_now)]).training
    assert row.rejected is None


async def test_the_terms_of_the_target_decide_about_both_answers_of_a_pair(configured: Configured) -> None:
    """The remote's answers may train here by a permission; without it only the pair with a person's target is left."""
    said = texts(40)
    records = []
    for number, text in enumerate(said):
        wrong = "tool" if right(text) != "tool" else "fruit"
        told = {"local": Answer(output={"kind": wrong}, model="student"), "score": Score(value=0.0)}
        remote = Answer(output={"kind": right(text)}, model="gpt-4o-mini", provider="openai@api.openai.com")
        records.append((number, answered(number, text).model_copy(update={**told, "remote": remote})))
    config = configured()
    store = await filled(config, records)
    try:
        [mine, *_] = [record for _, record in records if not held_out(fingerprint(record.input))]
        await feedback.give(config, store, mine.request_id, "corrected", at=900.0, target={"kind": "animal"})
        task = config.task("sort")
        selection = await choose(config, task, store, await gold(store, "sort"))
        assert len(dialogues.pairs(selection.training)) == len(selection.training) > 20
        permitted, sifted = lawful(config, task, selection, date(2026, 11, 21))
        assert len(sifted.refused) == len(selection.training) - 1
        [pair] = dialogues.pairs(permitted.training)
        assert (pair.input, pair.preferred) == (mine.input, {"kind": "animal"})
    finally:
        await store.close()


# --- benchmarks


def task_with(tmp_path: Path, *names: str) -> TaskConfig:
    text = YAML.replace("evaluator:", f"benchmarks: [{', '.join(names)}]\n    evaluator:").replace(
        "BASE_URL", "http://127.0.0.1:9"
    )
    return parse(text, tmp_path / "apprentice.yaml").tasks[0]


def test_rows_that_are_in_a_benchmark_do_not_train_and_are_counted_by_file(tmp_path: Path) -> None:
    said = texts(60)
    trained = [text for text in said if not held_out(fingerprint({"text": text}))]
    jsonl = [{"id": 1, "text": trained[0].upper()}, {"input": {"text": trained[1]}}]
    jsonl.append({"question": f"{trained[2]}!", "answer": "fruit"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, jsonl)) + "\n\n")
    (tmp_path / "b.csv").write_text(f'id,text,label\n7,"{trained[3]}",tool\n')
    (tmp_path / "c.txt").write_text(f"{trained[4]}\nfruit\n")
    apart = benchmarks(task_with(tmp_path, "a.jsonl", "b.csv", "c.txt"))
    assert [len(inputs) for inputs in apart.values()] == [3, 1, 1]
    found = select(recorded(said), benchmarks=apart)
    assert told(found.training) == set(trained[5:])
    assert found.left_out == {
        f"near a row of {tmp_path / name}": n for name, n in (("a.jsonl", 3), ("b.csv", 1), ("c.txt", 1))
    }
    assert told(found.held_out) == set(said) - set(trained)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: is not JSON"),
        ("a.jsonl", b"\n", "no text"),
        ("a.txt", b"\xff\xfe\x00", "codec can't decode"),
        ("a.csv", b'text\n"never closed', "unexpected end of data"),
        ("a.txt", None, "No such file"),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_refused_by_field_and_file(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as raised:
        benchmarks(task_with(tmp_path, name))
    assert "benchmarks[0]" in str(raised.value) and name in str(raised.value) and raised.value.hint


def test_the_configuration_says_which_benchmark_is_missing_or_of_another_kind(tmp_path: Path) -> None:
    text = YAML.replace("BASE_URL", "http://127.0.0.1:9")
    named = text.replace("evaluator:", "benchmarks: [a.txt]\n    evaluator:")
    config = parse(named, tmp_path / "apprentice.yaml")
    assert missing(config) == [f"tasks[0].benchmarks[0]: there is no file {tmp_path / 'a.txt'}"]
    with pytest.raises(ConfigError, match=r"benchmarks.*should be a \.jsonl, \.csv or \.txt file"):
        parse(named.replace("a.txt", "a.parquet"), tmp_path / "apprentice.yaml")


# --- in a cycle


async def filled(config: Config, records: list[tuple[int, Record]]) -> Store:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    for _, record in records:
        await store.append(record)
    return store


async def test_a_cycle_measures_both_hold_outs_and_baselines_and_keeps_what_the_set_is_like(
    configured: Configured, tmp_path: Path
) -> None:
    said = texts(160)
    trained = [text for text in said if not held_out(fingerprint({"text": text}))]
    (tmp_path / "b.txt").write_text(trained[0])
    config = configured(
        text=YAML.replace("evaluator:", "benchmarks: [b.txt]\n    evaluator:").replace(
            "local:", "local:\n  holdout_frozen: 4\n  holdout_rolling: 10"
        )
    )
    store = await filled(config, recorded(said))
    try:
        first = await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        assert first is not None
        about, examined = first.metrics["set"], first.metrics["examination"]
        held = len(said) - len(trained)
        assert (first.trained_on, about["rows"], about["held_out"]) == (len(trained) - 1, len(trained) - 1, held)
        assert about["left_out"] == {f"near a row of {tmp_path / 'b.txt'}": 1}
        assert about["fields"]["kind"]["labels"] == 3 and about["fields"]["kind"]["drift"]["n"] >= 30
        assert first.metrics["held_out"]["n"] == examined["n"] == 10
        assert examined["frozen"]["n"] == 4 and examined["frozen"]["champion"] is None
        assert examined["majority"] < examined["nearest"]["agreement"] <= 1 and examined["nearest"]["n"] == 10
        assert examined["untrained"] is None  # the embedded student is nothing before it was taught
        for number, text in enumerate(texts(100, seed=4)):
            await store.append(answered(500 + number, text))
        second = await learn(config, "sort", store, clock=lambda: 6.0, owner="a", force=True)
        assert second is not None and second.metrics["frozen"] == first.metrics["frozen"]
        assert second.metrics["examination"]["frozen"]["champion"] == examined["frozen"]["agreement"]
        assert frozen_rows(await store.versions("sort")) == tuple(first.metrics["frozen"])
    finally:
        await store.close()


async def test_a_candidate_that_lost_what_was_known_first_is_rejected_by_the_frozen_hold_out(
    configured: Configured,
) -> None:
    config = configured(text=YAML.replace("local:", "local:\n  holdout_frozen: 15\n  holdout_rolling: 10"))
    store = await filled(config, recorded(texts(150)))
    try:
        assert await learn(config, "sort", store, clock=lambda: 1.0, owner="a") is not None
        # The same things are answered otherwise from now on: right on the newest rows held out, wrong on the oldest.
        other = {"fruit": "animal", "animal": "tool", "tool": "fruit"}
        for number, text in enumerate(texts(300, seed=9)):
            await store.append(answered(1000 + number, text, other[right(text)]))
        second = await learn(config, "sort", store, clock=lambda: 2.0, owner="a", force=True)
        assert second is not None and second.state == "rejected"
        assert second.metrics["reason"].startswith("the frozen hold-out: worse than the champion by")
        assert second.metrics["held_out"]["candidate"] > second.metrics["held_out"]["champion"]
    finally:
        await store.close()


async def test_a_benchmark_that_is_gone_ends_the_cycle_before_anything_is_taught(
    configured: Configured, tmp_path: Path
) -> None:
    (tmp_path / "b.txt").write_text("a text of some words")
    config = configured(text=YAML.replace("evaluator:", "benchmarks: [b.txt]\n    evaluator:"))
    (tmp_path / "b.txt").unlink()
    store = await filled(config, recorded(texts(60)))
    try:
        with pytest.raises(ConfigError, match=r"benchmarks\[0\]"):
            await learn(config, "sort", store, clock=lambda: 1.0, owner="a")
        assert await store.versions("sort") == []
        assert not list(config.local.model_dir.glob("**/manifest.json"))
    finally:
        await store.close()


def test_export_and_versions_say_what_was_left_out_and_what_the_set_is_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = texts(120)
    trained = [text for text in said if not held_out(fingerprint({"text": text}))]
    (tmp_path / "b.txt").write_text(trained[0])
    file = tmp_path / "apprentice.yaml"
    text = YAML.replace("evaluator:", "benchmarks: [b.txt]\n    evaluator:").replace("BASE_URL", "http://127.0.0.1:9")
    file.write_text(text)
    config = parse(text, file)
    config.store.path.parent.mkdir(parents=True, exist_ok=True)

    async def fill() -> None:
        store = await filled(config, recorded(said))
        try:
            await learn(config, "sort", store, clock=lambda: 5.0, owner="a")
        finally:
            await store.close()

    asyncio.run(fill())
    reason = f"near a row of {tmp_path / 'b.txt'}"
    options = ["--config", str(file)]
    assert cli.main(["export", "sort", "--out", str(tmp_path / "out"), "--json", *options]) == 0
    card: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert card["left_out"] == {reason: 1}
    assert card["set"]["fields"]["kind"]["labels"] == 3
    assert card["splits"]["train"]["rows"] == len(trained) - 1
    assert reason in (tmp_path / "out" / "README.md").read_text()
    assert cli.main(["versions", "sort", *options]) == 0
    shown = capsys.readouterr().out
    for part in (f"1 rows left out, {reason}", "kind: 3 labels", "by chance", "always the commonest", "v1 frozen: agr"):
        assert part in shown
    assert cli.main(["versions", "sort", "--json", *options]) == 0
    [version] = json.loads(capsys.readouterr().out)["versions"]
    assert version["metrics"]["set"]["left_out"] == {reason: 1} and "frozen" not in version["metrics"]


async def test_a_correction_of_a_frozen_row_changes_its_target_and_not_its_place(configured: Configured) -> None:
    config = configured()
    store = await filled(config, recorded(texts(80)))
    try:
        task = config.task("sort")
        before = await choose(config, task, store, [])
        row = before.held_out[0]
        assert row.request_id is not None
        await feedback.give(config, store, row.request_id, "corrected", at=900.0, target={"kind": "tool"})
        after = await choose(config, task, store, await gold(store, "sort"))
        assert after.frozen == before.frozen and key_of(after.held_out[0]) == key_of(row)
        assert (after.held_out[0].source, after.held_out[0].target) == ("gold", {"kind": "tool"})
    finally:
        await store.close()


def test_versions_that_froze_nothing_say_so() -> None:
    made = Version(id="v1", task="sort", checkpoint="c", path="p", state="champion", trained_on=1, created_at=1.0)
    assert frozen_rows([]) == frozen_rows([made]) == ()
