from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import demo, heads, plugins
from apprentice.calibration import SAME, Table, calibrate, checked
from apprentice.errors import CannotLearn, ConfigError, TrainingError
from apprentice.testing.trainers import TASK, THINGS, examples
from apprentice.trainers import Updater, keep
from apprentice.trainers._calibration import calibration
from apprentice.types import Example, Json, Task, Trainer


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    built: Trainer = plugins.build("trainers", "embedded")
    return built


def test_the_manifest_says_what_was_learned_from_what(trainer: Trainer, tmp_path: Path) -> None:
    checkpoint = trainer.train(TASK, examples(), into=tmp_path, seed=3)
    manifest = checkpoint.manifest
    assert manifest["task"] == "sort"
    assert manifest["examples"] == 72
    assert manifest["output_schema"] == TASK.output_schema
    assert manifest["trainer"]["seed"] == 3
    assert manifest["heads"][0]["choice"]["symbols"] == ['"animal"', '"fruit"', '"tool"']
    assert 0.8 < manifest["metrics"]["agreement"] <= 1
    assert manifest["metrics"]["fields"] == {"kind": manifest["metrics"]["agreement"]}
    assert str(tmp_path) not in json.dumps(manifest)


def test_every_request_has_a_confidence_from_a_student_that_had_not_seen_it(trainer: Trainer, tmp_path: Path) -> None:
    dice = Random(0)
    noisy = [example.model_copy(update={"target": {"kind": dice.choice(sorted(THINGS))}}) for example in examples()]
    unnamed = examples(1)[0].model_copy(update={"request_id": None, "input": {"text": "an apple again"}})
    checkpoint = trainer.train(TASK, [*noisy, unnamed], into=tmp_path, seed=0)
    held_out = json.loads((checkpoint.path / "oof.json").read_text())
    assert set(held_out) == {f"r{number}" for number in range(72)}
    assert checkpoint.manifest["out_of_fold"] == {name: pair[0] for name, pair in held_out.items()}
    right = sum(pair[1] for pair in held_out.values()) / 72
    model = plugins.build("models", "embedded", checkpoint=checkpoint.path)
    seen = model.answer_many(TASK, [example.input for example in noisy])
    fitted = sum(a.output == e.target for a, e in zip(seen, noisy, strict=True)) / 72
    assert right < fitted, "a row was examined on a student that had learned it"


def test_what_is_served_and_what_is_held_out_went_through_the_table(trainer: Trainer, tmp_path: Path) -> None:
    dice = Random(0)
    noisy = [
        example if dice.random() < 0.6 else example.model_copy(update={"target": {"kind": dice.choice(sorted(THINGS))}})
        for example in examples(150)
    ]
    checkpoint = trainer.train(TASK, noisy, into=tmp_path, seed=0)
    table = checkpoint.manifest["calibration"]
    student, _ = heads.load(checkpoint.path)
    unseen = [f"where is the {thing}?" for things in THINGS.values() for thing in things]
    raw = [sure for _, sure in student.answers(plugins.build("encoders", "minilm").encode(unseen))]
    model = plugins.build("models", "embedded", checkpoint=checkpoint.path)
    served = [answer.confidence for answer in model.answer_many(TASK, [{"text": text} for text in unseen])]
    assert served == pytest.approx([calibrate(table, value) for value in raw], abs=1e-5)
    assert np.argsort(served).tolist() == np.argsort(raw).tolist()
    held_out = json.loads((checkpoint.path / "oof.json").read_text())
    confidence, right = np.array(list(held_out.values())).T
    assert abs(confidence.mean() - right.mean()) < 0.05
    assert {"rule", "ece", "auroc"} == set(checkpoint.manifest["metrics"]["calibration"])


@pytest.mark.parametrize(("count", "more"), [(150, 50), pytest.param(300, 100, marks=pytest.mark.slow)])
def test_inputs_of_another_domain_are_answered_with_less_confidence(
    trainer: Trainer, tmp_path: Path, count: int, more: int
) -> None:
    rows = demo.recording("banking77", None)[: count + more]
    task = demo.settings("banking77", base_url="http://127.0.0.1:1", folder=tmp_path).tasks[0].task
    taught = [
        Example(input={"text": row.text}, target={"intent": row.teacher}, source="remote") for row in rows[:count]
    ]
    checkpoint = trainer.train(task, taught, into=tmp_path, seed=0)
    model = plugins.build("models", "embedded", checkpoint=checkpoint.path)
    elsewhere = [
        f"{doing} {what}"
        for doing in ("simmer gently until soft:", "the football team fielded", "a proof by induction on")
        for what in ("two chopped onions", "eleven goalkeepers", "the height of the tree", "a rainy afternoon")
    ]

    def sure(texts: list[str]) -> float:
        return float(np.mean([answer.confidence for answer in model.answer_many(task, [{"text": t} for t in texts])]))

    assert sure(elsewhere) < sure([row.text for row in rows[count:]]) - 0.2


# --- the table of calibration -----------------------------------------------------------------------------------------


def fitted(raw: np.ndarray, chance: np.ndarray, seed: int = 0) -> tuple[Table, dict[str, Json]]:
    """The table for answers that are right by `chance`, from five folds."""
    right = np.random.default_rng(seed).random(len(raw)) < chance
    table, quality = calibration(heads.OutOfFold(raw, right, {}), np.ones(len(raw)), np.arange(len(raw)) % 5)
    return table, quality["calibration"]


def away(table: Table, raw: np.ndarray, chance: np.ndarray) -> float:
    return float(np.mean([abs(calibrate(table, r) - c) for r, c in zip(raw.tolist(), chance.tolist(), strict=True)]))


@pytest.mark.parametrize(
    ("count", "shape", "rule", "within"),
    [
        (1500, "logistic", "platt", 0.03),
        (1500, "steps", "isotonic", 0.06),
        (299, "steps", "platt", 0.15),
        (60, "logistic", "platt", 0.1),
    ],
)
def test_isotonic_regression_is_taken_from_300_rows_on_and_only_where_it_is_clearly_better(
    count: int, shape: str, rule: str, within: float
) -> None:
    raw = np.random.default_rng(1).random(count)
    odds = np.log(raw / (1 - raw))
    chance = 1 / (1 + np.exp(-0.7 * odds - 0.8)) if shape == "logistic" else np.where(raw < 0.8, 0.5, 0.98)
    table, quality = fitted(raw, chance)
    assert quality["rule"] == rule
    assert away(table, raw, chance) < within < away(SAME, raw, chance)
    assert quality["ece"] < (0.05 if count > 1000 else 0.2)
    assert quality["auroc"] > 0.5


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 0.7, 0.70004, 0.3, 1e-7]), st.booleans()), min_size=2),
    st.integers(1, 40),
)
def test_any_pairs_give_a_small_rising_table_that(pairs: list[tuple[float, bool]], times: int) -> None:
    raw, right = (np.array(column * times) for column in zip(*pairs, strict=True))
    found = heads.OutOfFold(raw, right, {})
    table, _ = calibration(found, np.ones(len(raw)), np.arange(len(raw)) % 2)
    assert checked(json.loads(json.dumps(table))) == table
    assert (table[0][0], table[-1][0]) == (0.0, 1.0)
    assert len(table) <= 34


def test_without_folds_the_table_changes_nothing(tmp_path: Path) -> None:
    [one] = examples(1)
    checkpoint = plugins.build("trainers", "embedded", encoder="tfidf").train(TASK, [one], into=tmp_path, seed=0)
    assert checkpoint.manifest["calibration"] == [[0.0, 0.0], [1.0, 1.0]]
    assert checkpoint.manifest["metrics"] == {}
    model = plugins.build("models", "embedded", checkpoint=checkpoint.path)
    assert [answer.output for answer in model.answer_many(TASK, [one.input])] == [one.target]


def test_equal_texts_are_held_out_together(trainer: Trainer, tmp_path: Path) -> None:
    """The label of each text is random: only a leak could find it out."""
    coin = ("fruit", "tool")
    rows = [
        Example(
            input={"text": f"code {number:03} {number * 7919 % 1000}"},
            target={"kind": coin[(number * 2654435761 >> 7) % 2]},
            source="teacher",
            request_id=f"{number}-{copy}",
        )
        for number in range(60)
        for copy in range(4)
    ]
    checkpoint = trainer.train(TASK, rows, into=tmp_path, seed=0)
    assert checkpoint.manifest["metrics"]["agreement"] < 0.75


def test_the_seed_moves_the_folds_only(trainer: Trainer, tmp_path: Path) -> None:
    one, two = (trainer.train(TASK, examples(), into=tmp_path, seed=seed) for seed in (0, 1))
    assert one.id != two.id
    assert one.manifest["out_of_fold"] != two.manifest["out_of_fold"]


def test_targets_that_do_not_fit_the_schema_are_left_out_and_counted(trainer: Trainer, tmp_path: Path) -> None:
    odd = [Example(input={"text": str(n)}, target=t, source="remote") for n, t in enumerate(({"kind": "ox"}, {}, None))]
    checkpoint = trainer.train(TASK, [*examples(), *odd], into=tmp_path, seed=0)
    assert checkpoint.manifest["left_out"] == 3
    assert checkpoint.manifest["examples"] == 72
    with pytest.raises(TrainingError, match="none of 3 examples"):
        trainer.train(TASK, odd, into=tmp_path, seed=0)


def test_inputs_of_several_fields_are_read_alike_in_training_and_serving(trainer: Trainer, tmp_path: Path) -> None:
    both = {"type": "object", "properties": {"subject": {"type": "string"}, "tier": {"type": "string"}}}
    task = TASK.model_copy(update={"input_schema": both})
    rows = [
        Example(input={"tier": tier, "subject": f"hello {n}"}, target={"kind": kind}, source="teacher")
        for n in range(15)
        for tier, kind in (("gold", "fruit"), ("wood", "tool"))
    ]
    checkpoint = trainer.train(task, rows, into=tmp_path, seed=0)
    model = plugins.build("models", "embedded", checkpoint=checkpoint.path)
    said = model.answer_many(task, [{"subject": "hello", "tier": "gold"}, {"tier": "wood", "subject": "hello"}])
    assert [answer.output["kind"] for answer in said] == ["fruit", "tool"]


def test_odd_texts_and_targets_can_be_trained_on(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"output_schema": {"type": "string"}})
    odd = ["", "\0", "half \ud83d", "x" * 100_000, "\u202e", "\U0001f600"]
    rows = [Example(input={"text": text}, target=text[:9], source="remote", request_id=text[:9]) for text in odd]
    for encoder in ("minilm", "tfidf"):
        checkpoint = plugins.build("trainers", "embedded", encoder=encoder).train(task, rows, into=tmp_path, seed=0)
        model = plugins.build("models", "embedded", checkpoint=checkpoint.path)
        assert {answer.output for answer in model.answer_many(task, [row.input for row in rows])} <= {
            text[:9] for text in odd
        }


def test_a_string_that_turns_out_to_be_free_text_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    properties = {"kind": {"enum": [*THINGS]}, "reply": {"type": "string"}}
    task = TASK.model_copy(update={"output_schema": {"type": "object", "properties": properties}})
    rows = [e.model_copy(update={"target": {**e.target, "reply": f"dear {e.request_id}"}}) for e in examples(240)]
    with pytest.raises(CannotLearn, match="'reply' has 240 different values"):
        plugins.build("trainers", "embedded", encoder="tfidf").train(task, rows, into=tmp_path, seed=0)
    assert list(tmp_path.glob("[!.]*")) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"encoder": "minlm"}, "minilm"), ({"c": 0.0}, "c should"), ({"folds": 1}, "folds should"), ({"d": 1}, "'d'")],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plugins.build("trainers", "embedded", **settings)


def test_another_process_makes_the_same_checkpoint(tmp_path: Path) -> None:
    here = plugins.build("trainers", "embedded", encoder="tfidf").train(TASK, examples(), into=tmp_path / "a", seed=0)
    code = (
        "import sys; from pathlib import Path; from apprentice import plugins\n"
        "from apprentice.testing.trainers import TASK, examples\n"
        "trainer = plugins.build('trainers', 'embedded', encoder='tfidf')\n"
        "print(trainer.train(TASK, examples(), into=Path(sys.argv[1]), seed=0).id)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "OPENBLAS_NUM_THREADS": "2"}
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True, check=True, env=environment
    )
    assert said.stdout.strip() == here.id


# --- keeping a checkpoint ---------------------------------------------------------------------------------------------


def test_a_kept_folder_is_left_alone_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    files = {"a": b"1", "b": b"2"}
    path = keep(tmp_path / "new" / "folder", "name", files)
    before = (path / "a").stat().st_mtime_ns
    assert keep(tmp_path / "new" / "folder", "name", files) == path
    assert (path / "a").stat().st_mtime_ns == before
    (path / "b").write_bytes(b"half")
    keep(tmp_path / "new" / "folder", "name", files)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files
    assert [entry.name for entry in path.parent.iterdir()] == ["name"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        keep(tmp_path, "name", {"a": b"1", "no/such/folder": b"2"})
    assert list(tmp_path.iterdir()) == []


def test_a_second_cycle_reads_the_vectors_of_the_first_and_learns_the_same(tmp_path: Path) -> None:
    trainer = plugins.build("trainers", "embedded", encoder="tfidf")
    rows = examples(30)
    first = trainer.train(TASK, rows, into=tmp_path, seed=0)
    [kept] = tmp_path.glob(".vectors-*.npy")
    before = kept.stat().st_ino
    again = trainer.train(TASK, rows, into=tmp_path, seed=0)
    assert again.id == first.id
    assert kept.stat().st_ino == before, "nothing was new, so nothing was written"
    kept.write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(TrainingError, match="cannot be read"):
        trainer.train(TASK, rows, into=tmp_path, seed=0)


def test_parts_are_moved_into_a_kept_folder_and_compared_byte_by_byte(tmp_path: Path) -> None:
    def part(content: bytes) -> dict[str, Path]:
        folder = tmp_path / "drafts" / "part"
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "a").write_bytes(content)
        return {"part": folder}

    into = tmp_path / "kept"
    path = keep(into, "name", {"manifest": b"m"}, part(b"1"))
    assert (path / "part" / "inner" / "a").read_bytes() == b"1"
    before = (path / "part" / "inner" / "a").stat().st_ino
    assert keep(into, "name", {"manifest": b"m"}, part(b"1")) == path
    assert (path / "part" / "inner" / "a").stat().st_ino == before
    (path / "part" / "inner" / "a").write_bytes(b"2")
    keep(into, "name", {"manifest": b"m"}, part(b"1"))
    assert (path / "part" / "inner" / "a").read_bytes() == b"1"
    assert [entry.name for entry in into.iterdir()] == ["name"]
    assert list((tmp_path / "drafts").iterdir()) == []


# --- going on from a checkpoint ---------------------------------------------------------------------------------------


def intents(tmp_path: Path, count: int) -> tuple[Task, list[Example]]:
    """Recorded answers to banking77, each text once, so that every row is new to who has not learned it."""
    rows = list({row.text: row for row in demo.recording("banking77", None)}.values())[:count]
    task = demo.settings("banking77", base_url="http://127.0.0.1:1", folder=tmp_path).tasks[0].task
    return task, [
        Example(input={"text": row.text}, target={"intent": row.teacher}, source="remote", request_id=str(number))
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("known", "taught", "count"), [(260, 310, 480), pytest.param(420, 500, 800, marks=pytest.mark.slow)]
)
def test_an_update_says_nearly_what_a_full_training_says(
    trainer: Trainer, tmp_path: Path, known: int, taught: int, count: int
) -> None:
    assert isinstance(trainer, Updater)
    task, rows = intents(tmp_path, count)
    base = trainer.train(task, rows[:known], into=tmp_path / "a", seed=0)
    full = trainer.train(task, rows[:taught], into=tmp_path / "a", seed=0)
    updated = trainer.update(task, rows[:taught], base=base.path, into=tmp_path / "a", seed=0, licence={})
    inputs = [row.input for row in rows[taught:]]
    said = [
        plugins.build("models", "embedded", checkpoint=checkpoint.path).answer_many(task, inputs)
        for checkpoint in (base, full, updated)
    ]
    same = [a.output == b.output for a, b in zip(said[1], said[2], strict=True)]
    unchanged = [a.output == b.output for a, b in zip(said[0], said[1], strict=True)]
    assert sum(same) >= 0.97 * len(same)
    assert sum(same) > sum(unchanged), "it learned from what was added"
    sure = [sum(answer.confidence for answer in each) / len(each) for each in said]
    assert sure[2] == pytest.approx(sure[1], abs=0.05)


def test_an_update_keeps_what_only_folds_could_tell(trainer: Trainer, tmp_path: Path) -> None:
    assert isinstance(trainer, Updater)
    task, rows = intents(tmp_path, 130)
    base = trainer.train(task, rows[:110], into=tmp_path, seed=0)
    wrong = [row.model_copy(update={"target": {"intent": rows[0].target["intent"]}}) for row in rows[10:14]]
    again = [rows[20].model_copy(update={"request_id": "asked again"})]
    updated = trainer.update(
        task, [*rows[:10], *wrong, *rows[14:], *again], base=base.path, into=tmp_path, seed=5, licence={}
    )
    manifest, before = updated.manifest, base.manifest
    assert manifest["calibration"] == before["calibration"]
    assert manifest["calibrated_on"] == 110
    assert manifest["examples"] == 131
    assert manifest["heads"][0]["weighing"] == before["heads"][0]["weighing"]
    assert manifest["heads"][0]["grown"] == before["heads"][0]["grown"]
    assert manifest["metrics"]["calibration"] == before["metrics"]["calibration"]
    told, known = (json.loads((c.path / "oof.json").read_text()) for c in (updated, base))
    assert told["5"] == known["5"]
    assert told["12"] == [known["12"][0], None], "whether it was right about another target was never found out"
    assert told["asked again"] == known["20"], "a request of its own, but no text that the base had not learned"
    assert told["125"][1] in (0, 1)
    unseen = plugins.build("models", "embedded", checkpoint=base.path).answer_many(task, [rows[125].input])[0]
    assert told["125"] == [pytest.approx(unseen.confidence, abs=1e-3), int(unseen.output == rows[125].target)]


def test_updates_of_every_kind_of_head_follow_a_full_training(trainer: Trainer, tmp_path: Path) -> None:
    """Numbers, lists, fields that may be absent or null; a symbol more in each."""
    properties = {
        "kind": {"enum": [*THINGS]},
        "size": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "note": {"type": ["boolean", "null"]},
    }
    task = TASK.model_copy(update={"output_schema": {"type": "object", "properties": properties, "required": ["kind"]}})

    def row(example: Example) -> Example:
        place = int((example.request_id or "r0")[1:])
        kind = example.target["kind"]
        target = {"kind": kind, "size": float(len(kind)) / 2, "tags": [kind[0], *(["late"] if place > 85 else [])]}
        target |= {"note": [True, None][place % 2]} if kind != "tool" else {}
        return example.model_copy(update={"target": target})

    rows = [row(example) for example in examples(105)]
    assert isinstance(trainer, Updater)
    base = trainer.train(task, rows[:85], into=tmp_path, seed=0)
    full = trainer.train(task, rows, into=tmp_path, seed=0)
    updated = trainer.update(task, rows, base=base.path, into=tmp_path, seed=0, licence={})
    one, other = (
        [
            a.output
            for a in plugins.build("models", "embedded", checkpoint=c.path).answer_many(task, [r.input for r in rows])
        ]
        for c in (full, updated)
    )
    assert sum(a["kind"] == b["kind"] for a, b in zip(one, other, strict=True)) >= 0.97 * len(rows)
    assert [o["size"] for o in other] == pytest.approx([o["size"] for o in one], abs=0.1)
    assert sum(set(a["tags"]) == set(b["tags"]) for a, b in zip(one, other, strict=True)) >= 0.95 * len(rows)
    assert updated.manifest["heads"][2]["several"]["symbols"] == full.manifest["heads"][2]["several"]["symbols"]


@pytest.mark.parametrize(
    ("settings", "schema", "said"),
    [
        ({"c": 5.0}, None, "trainer"),
        ({"folds": 4}, None, "trainer"),
        ({"encoder": "minilm"}, None, "encoder"),
        ({}, {"enum": ["fruit", "animal", "tool"]}, "output_schema"),
        ({}, TASK.output_schema["properties"]["kind"] | {"x-free-text": False}, ""),
    ],
)
def test_only_the_same_lesson_is_continued(settings: dict[str, Json], schema: Json, said: str, tmp_path: Path) -> None:
    usual = {"encoder": "tfidf"}
    base = plugins.build("trainers", "embedded", **usual).train(TASK, examples(), into=tmp_path, seed=0)
    properties = {"kind": schema or TASK.output_schema["properties"]["kind"]}
    task = TASK.model_copy(update={"output_schema": TASK.output_schema | {"properties": properties}})
    trainer = plugins.build("trainers", "embedded", **usual | settings)
    if not said:  # a mark is no change
        assert trainer.update(task, examples(), base=base.path, into=tmp_path, seed=0).manifest["examples"] == 72
        return
    with pytest.raises(TrainingError, match=f"taught otherwise .*{said}"):
        trainer.update(task, examples(), base=base.path, into=tmp_path, seed=0)


def test_a_head_that_has_to_become_another_kind_is_taught_in_full(tmp_path: Path) -> None:
    trainer = plugins.build("trainers", "embedded", encoder="tfidf")
    one = [row for row in examples(200) if row.target["kind"] == "fruit"]
    base = trainer.train(TASK, one, into=tmp_path, seed=0)
    with pytest.raises(TrainingError, match="'kind' now takes other kinds of values") as caught:
        trainer.update(TASK, [*one, *examples(18)[-1:]], base=base.path, into=tmp_path, seed=0)
    assert caught.value.hint
    (base.path / "rows.npy").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"rows\.npy"):
        trainer.update(TASK, one, base=base.path, into=tmp_path, seed=0)
