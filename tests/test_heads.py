from __future__ import annotations

import io
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import fields, heads
from apprentice.errors import CannotLearn, ConfigError, TrainingError
from apprentice.types import Json, Task

SIZE = 16


def task(output_schema: dict[str, Json]) -> Task:
    return Task(name="t", description="", input_schema={}, output_schema=output_schema)


def a_field(schema: dict[str, Json], *, required: bool = True) -> dict[str, Json]:
    return {"type": "object", "properties": {"x": schema}, "required": ["x"] if required else []}


def vectors_of(numbers: Sequence[int], seed: int = 0, noise: float = 0.1) -> Any:
    """A direction a number, with noise, of unit length."""
    dice = np.random.default_rng(seed)
    rows = np.eye(SIZE)[np.array(numbers)] + noise * dice.standard_normal((len(numbers), SIZE))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_letters(texts: Sequence[str]) -> Any:
    return vectors_of([sum(map(ord, text)) % SIZE for text in texts], noise=0.01)


def taught(schema: dict[str, Json], outputs: Sequence[Json], vectors: Any, **settings: Any) -> heads.Student:
    return learned(schema, outputs, vectors, **settings)[0]


def learned(
    schema: dict[str, Json],
    outputs: Sequence[Json],
    vectors: Any,
    *,
    folds: int = 5,
    weights: Sequence[float] | None = None,
    counted: Sequence[str] | None = None,
) -> tuple[heads.Student, heads.OutOfFold | None]:
    wanted = fields.of(task(schema), counted)
    symbols = [[field.symbol(output) or "" for field in wanted] for output in outputs]
    parts = [number % folds for number in range(len(outputs))]
    return heads.learn(wanted, vectors, symbols, weights or [1.0] * len(outputs), parts, encode=by_letters, c=30.0)


# --- what is learned --------------------------------------------------------------------------------------------------


def test_categories_are_learned_and_confidence_is_an_honest_probability() -> None:
    numbers = [number % 8 for number in range(800)]
    dice = np.random.default_rng(3)
    labels = [f"k{dice.integers(8) if dice.random() < 0.3 else n}" for n in numbers]  # 26 % are wrong
    outputs = [{"x": label} for label in labels]
    vectors = vectors_of(numbers, noise=0.2)
    student, found = learned(a_field({"type": "string"}), outputs[:600], vectors[:600])
    answers = student.answers(vectors[600:])
    agreement = np.mean([answer == output for (answer, _), output in zip(answers, outputs[600:], strict=True)])
    confidence = np.mean([sure for _, sure in answers])
    assert found is not None
    assert abs(agreement - 0.74) < 0.08
    assert abs(confidence - agreement) < 0.08
    assert abs(found.right.mean() - agreement) < 0.08


def test_confidence_ranks_right_answers_above_wrong_ones() -> None:
    numbers = [number % 8 for number in range(600)]
    outputs = [{"x": f"k{n}"} for n in numbers]
    vectors = vectors_of(numbers, noise=0.45)
    student = taught(a_field({"type": "string"}), outputs[:300], vectors[:300])
    answers = student.answers(vectors[300:])
    right = np.array([answer == output for (answer, _), output in zip(answers, outputs[300:], strict=True)])
    surest = np.argsort([-sure for _, sure in answers])
    assert 0.3 < right.mean() < 0.95
    assert right[surest[:150]].mean() > right[surest[150:]].mean() + 0.15


def test_a_label_that_names_itself_is_learned_from_fewer_examples() -> None:
    names = ["b", "c", "d", "e", "f", "g", "h", "i"]  # by_letters puts each into its own direction
    numbers = [ord(name) % SIZE for name in names]
    which = np.random.default_rng(0).integers(8, size=24)
    vectors = vectors_of([numbers[w] for w in which], noise=0.45)
    fresh = vectors_of(numbers * 40, seed=9, noise=0.45)

    def agreement(labels: list[str]) -> float:
        student = taught(a_field({"type": "string"}), [{"x": labels[w]} for w in which], vectors)
        said = [output["x"] for output, _ in student.answers(fresh)]
        return float(np.mean([a == b for a, b in zip(said, labels * 40, strict=True)]))

    misleading = names[3:] + names[:3]
    assert agreement(names) > agreement(misleading) + 0.05
    assert agreement(misleading) > 0.3, "a name that says nothing is not believed"


def test_how_frequent_a_category_is_decides_only_where_that_is_right_more_often() -> None:
    dice = np.random.default_rng(0)
    often = ["often" if dice.random() < 0.8 else "rarely" for _ in range(300)]
    blind = vectors_of(dice.integers(SIZE, size=300).tolist())  # say nothing about the label
    student, found = learned(a_field({"type": "string"}), [{"x": label} for label in often], blind)
    said = [output["x"] for output, _ in student.answers(blind)]
    assert said.count("often") > 270
    assert found is not None
    assert found.agreement["x"] > 0.65
    evened = [head.evened(1.0).guess(blind).symbols for head in student.heads]
    assert evened[0].count('"rarely"') > said.count("rarely") + 60


def test_confidence_is_lower_far_from_all_examples() -> None:
    numbers = [number % 8 for number in range(400)]
    dice = np.random.default_rng(1)
    outputs = [{"x": f"k{dice.integers(8) if dice.random() < 0.2 else n}"} for n in numbers]
    student = taught(a_field({"type": "string"}), outputs, vectors_of(numbers, noise=0.3))
    known = [sure for _, sure in student.answers(vectors_of(range(8), seed=5, noise=0.3))]
    strange = [sure for _, sure in student.answers(vectors_of(range(8, SIZE), seed=5, noise=0.3))]
    assert np.mean(strange) < np.mean(known) - 0.3


def test_evidence_is_believed_as_far_as_it_was_right_and_more_margin_is_never_less_sure() -> None:
    dice = np.random.default_rng(2)
    evidence = dice.standard_normal((800, 3))
    ones = np.ones(800)
    right = dice.random(800) < 1 / (1 + np.exp(-2 * evidence[:, 1] - 0.5))
    slope, useful, useless, offset = heads.weigh(evidence, right, ones)
    assert 0.05 <= slope < 0.4
    assert abs(useful - 2) < 0.5
    assert abs(useless) < 0.3
    assert abs(offset - 0.5) < 0.3
    assert heads.weigh(-evidence[:, 1], right, ones)[0] == 0.05
    assert heads.weigh(evidence, right, 1e-4 * ones) == pytest.approx((1, 0, 0, 0), abs=0.1), "little proves little"


def test_a_field_that_cannot_be_known_does_not_hide_one_that_can() -> None:
    numbers = [number % 8 for number in range(800)]
    dice = np.random.default_rng(0)
    outputs = [{"x": f"k{n}", "y": bool(dice.random() < 0.5)} for n in numbers]
    vectors = vectors_of(numbers, noise=0.45)
    schema = {"type": "object", "properties": {"x": {"type": "string"}, "y": {"type": "boolean"}}}
    student = taught(schema, outputs[:400], vectors[:400])
    sure, right = np.array(
        [
            (confidence, answer["x"] == output["x"])
            for (answer, confidence), output in zip(student.answers(vectors[400:]), outputs[400:], strict=True)
        ]
    ).T
    x, y = student.heads
    margins = x.guess(vectors[400:]).sure * y.guess(vectors[400:]).sure

    def gap(by: Any) -> float:
        surest = np.argsort(-by)
        return float(right[surest[:200]].mean() - right[surest[200:]].mean())

    assert gap(sure) > gap(margins) + 0.05


def test_integers_of_few_values_are_categories_and_of_many_are_numbers() -> None:
    numbers = [number % 4 for number in range(200)]
    few = taught(a_field({"type": "integer"}), [{"x": 10**n} for n in numbers], vectors_of(numbers))
    assert [output["x"] for output, _ in few.answers(vectors_of([0, 1, 2, 3]))] == [1, 10, 100, 1000]
    numbers = [number % SIZE for number in range(400)]
    many = taught(a_field({"type": "integer"}), [{"x": 7 * n} for n in numbers], vectors_of(numbers, noise=0.02))
    said = [output["x"] for output, _ in many.answers(vectors_of(range(SIZE), noise=0.0))]
    assert all(type(value) is int for value in said)
    assert max(abs(value - 7 * n) for n, value in enumerate(said)) <= 3


def test_numbers_stay_within_the_range_seen_and_keep_its_digits_and_step() -> None:
    numbers = [number % SIZE for number in range(320)]
    outputs = [{"x": 0.25 * n} for n in numbers]
    wild = 5 * vectors_of(numbers, seed=4, noise=1.0)
    plain = taught(a_field({"type": "number"}), outputs, vectors_of(numbers))
    halves = [{"x": 0.5 * n} for n in numbers]
    stepped = taught(a_field({"type": "number", "multipleOf": 0.5}), halves, vectors_of(numbers))
    values = [output["x"] for output, _ in plain.answers(wild)]
    assert min(values) == 0.0
    assert max(values) == 3.75
    assert all(value == round(value, 2) for value in values)
    assert len(set(values)) > 20
    assert {output["x"] % 0.5 for output, _ in stepped.answers(vectors_of(numbers))} == {0.0}


def test_a_number_is_surer_where_the_residuals_were_small() -> None:
    numbers = [number % SIZE for number in range(1600)]
    dice = np.random.default_rng(0)
    outputs = [{"x": n + (dice.normal() * 6 if n % 2 else 0.0)} for n in numbers]
    student = taught(a_field({"type": "number"}), outputs, vectors_of(numbers, noise=0.02))
    sure = [confidence for _, confidence in student.answers(vectors_of(range(SIZE), noise=0.0))]
    assert np.mean(sure[0::2]) > np.mean(sure[1::2]) + 0.2


def test_lists_are_learned_a_category_at_a_time_in_the_schemas_order_and_bounds() -> None:
    schema = a_field({"type": "array", "items": {"enum": ["b", "a", "never"]}, "minItems": 1, "maxItems": 1})
    lists = {0: ["a"], 1: ["b"]}
    numbers = [number % 2 for number in range(60)]
    student = taught(schema, [{"x": lists[n]} for n in numbers], vectors_of(numbers))
    assert [output["x"] for output, _ in student.answers(vectors_of([0, 1, 7]))][:2] == [["a"], ["b"]]
    assert all(len(output["x"]) == 1 for output, _ in student.answers(vectors_of([5, 6, 7, 8])))
    free = a_field({"type": "array", "items": {"enum": ["b", "a"]}})
    both = {0: [], 1: ["a"], 2: ["a", "b"]}
    numbers = [number % 3 for number in range(90)]
    student, found = learned(free, [{"x": both[n]} for n in numbers], vectors_of(numbers))
    assert [output["x"] for output, _ in student.answers(vectors_of([0, 1, 2]))] == [[], ["a"], ["b", "a"]]
    assert found is not None
    assert found.agreement["x"] > 0.95, "the order of a list's items does not matter"


@pytest.mark.parametrize("schema", [{"type": "number"}, {"type": "array", "items": {"type": "string"}}])
def test_optional_and_null_fields_are_answered_as_such(schema: dict[str, Json]) -> None:
    value: Json = 1.5 if schema["type"] == "number" else ["a"]
    other: Json = 2.5 if schema["type"] == "number" else ["b"]
    nullable = a_field({"anyOf": [schema, {"type": "null"}]}, required=False)
    shapes: list[Json] = [{}, {"x": None}, {"x": value}, {"x": other}]
    numbers = [number % 4 for number in range(120)]
    student = taught(nullable, [shapes[n] for n in numbers], vectors_of(numbers, noise=0.02))
    said = [output for output, _ in student.answers(vectors_of(range(4), noise=0.0))]
    assert said[:2] == shapes[:2]
    assert all(output["x"] is not None for output in said[2:])


def test_an_output_that_is_no_object_is_answered_bare() -> None:
    numbers = [0, 1] * 20
    student = taught({"type": "boolean"}, [n == 1 for n in numbers], vectors_of(numbers))
    assert [output for output, _ in student.answers(vectors_of([0, 1]))] == [False, True]


def test_fields_come_in_the_schemas_order_and_only_what_counts_makes_the_confidence() -> None:
    numbers = [number % 4 for number in range(200)]
    dice = np.random.default_rng(0)
    schema = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "boolean"}}}
    outputs = [{"a": bool(dice.random() < 0.5), "z": f"k{n}"} for n in numbers]  # `a` cannot be known
    every = taught(schema, outputs, vectors_of(numbers))
    only = taught(schema, outputs, vectors_of(numbers), counted=["z"])
    (output, sure), (same, surer) = every.answers(vectors_of([0]))[0], only.answers(vectors_of([0]))[0]
    assert list(output) == ["z", "a"]
    assert output == same
    assert sure < 0.75
    assert surer > 0.9


def test_one_value_is_a_constant_that_grows_surer_with_examples() -> None:
    def sure(count: int, schema: dict[str, Json], value: Json) -> float:
        student = taught(a_field(schema), [{"x": value}] * count, vectors_of([0] * count))
        ((output, confidence),) = student.answers(vectors_of([3]))
        assert output == {"x": value}
        return confidence

    for schema, value in (
        ({"type": "string"}, "a"),
        ({"type": "number"}, 2.5),
        ({"type": "array", "items": {"type": "string"}}, []),
    ):
        assert sure(1, schema, value) < 0.95
        assert sure(1, schema, value) < sure(10, schema, value) <= sure(200, schema, value)
        assert sure(200, schema, value) > 0.98


def test_a_string_that_turns_out_to_be_free_text_is_refused_by_name() -> None:
    outputs = [{"x": f"reply number {number}"} for number in range(250)]
    with pytest.raises(CannotLearn, match="'x' has 250 different values in 250 examples"):
        taught(a_field({"type": "string"}), outputs, vectors_of([0] * 250))


def test_nothing_to_learn_from_is_a_training_error() -> None:
    with pytest.raises(TrainingError):
        taught(a_field({"type": "string"}), [], np.empty((0, SIZE), np.float32))


def test_weights_are_honoured_by_every_kind_of_head() -> None:
    for schema, left, right in (
        ({"type": "string"}, "l", "r"),
        ({"type": "number"}, 0.0, 1.0),
        ({"type": "array", "items": {"type": "string"}}, ["l"], ["l", "r"]),
    ):
        outputs = [{"x": left}, {"x": right}] * 30
        for weights, close in (([9.0, 1.0] * 30, left), ([1.0, 9.0] * 30, right)):
            student = taught(a_field(schema), outputs, vectors_of([0] * 60), weights=weights)
            ((output, _),) = student.answers(vectors_of([0], noise=0.0))
            assert output["x"] == (pytest.approx(close, abs=0.2) if schema["type"] == "number" else close)


VALUES = {
    "category": ({"type": "string"}, st.sampled_from(["a", "b", "c_d", ""])),
    "flag": ({"type": ["boolean", "null"]}, st.sampled_from([True, False, None])),
    "count": ({"type": "integer"}, st.integers(-40, 40)),
    "share": ({"type": "number"}, st.floats(-5, 5)),
    "tags": ({"type": "array", "items": {"enum": ["p", "q"]}}, st.lists(st.sampled_from(["p", "q"]), unique=True)),
}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_was_learned_answers_fit_the_schema_and_survive_saving(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, unique=True))
    required = [name for name in names if data.draw(st.booleans())]
    schema = {"type": "object", "properties": {name: VALUES[name][0] for name in names}, "required": required}
    one = {name: VALUES[name][1] if name in required else st.one_of(st.just(...), VALUES[name][1]) for name in names}
    rows = data.draw(st.lists(st.fixed_dictionaries(one), min_size=1, max_size=12))
    outputs = [{name: value for name, value in row.items() if value is not ...} for row in rows]
    vectors = vectors_of([number % SIZE for number in range(len(outputs))])
    student, _ = learned(schema, outputs, vectors, folds=2)
    wanted = fields.of(task(schema))
    asked = vectors_of(range(SIZE), seed=5, noise=0.5)
    for output, confidence in student.answers(asked):
        assert all(field.symbol(output) is not None for field in wanted), output
        assert set(output) >= set(required)
        assert 0 <= confidence <= 1
        for name in set(output) & {"category", "flag"}:
            assert output[name] in [known[name] for known in outputs if name in known]
    name, contents = heads.files(student, {"encoder": {"dimension": SIZE}}, {})
    assert (name, contents) == heads.files(student, {"encoder": {"dimension": SIZE}}, {})


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[heads.Student, Path]:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"type": "string"},
            "n": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
            "fixed": {"type": "boolean"},
        },
        "required": ["kind", "tags", "fixed"],
    }
    numbers = [number % 5 for number in range(100)]
    outputs: list[dict[str, Json]] = [{"kind": f"k{n}", "tags": [f"t{n}"], "fixed": True} for n in numbers]
    for output, n in zip(outputs, numbers, strict=True):
        output |= {"n": 1.5 * n} if n else {}
    student = taught(schema, outputs, vectors_of(numbers))
    name, contents = heads.files(student, {"encoder": {"dimension": SIZE}}, {"beside.json": b"{}"})
    (tmp_path / name).mkdir()
    for file, content in contents.items():
        (tmp_path / name / file).write_bytes(content)
    return student, tmp_path / name


def test_a_loaded_student_answers_like_the_one_that_was_saved(saved: tuple[heads.Student, Path]) -> None:
    student, path = saved
    loaded, manifest = heads.load(path)
    asked = vectors_of([number % SIZE for number in range(64)], seed=8, noise=0.4)
    assert loaded.answers(asked) == student.answers(asked)
    assert manifest["format"] == heads.FORMAT


@pytest.mark.parametrize("file", ["weights.npy", "manifest.json", "beside.json"])
def test_a_changed_or_missing_file_is_noticed(saved: tuple[heads.Student, Path], file: str) -> None:
    _, path = saved
    content = bytearray((path / file).read_bytes())
    content[-1] ^= 1
    (path / file).write_bytes(content)
    with pytest.raises(ConfigError, match="damaged"):
        heads.load(path)
    (path / file).unlink()
    with pytest.raises(ConfigError, match=r"damaged|no checkpoint"):
        heads.load(path)


def forged(path: Path, manifest: dict[str, Json], weights: Any) -> Path:
    """The checkpoint with other contents, and all its hashes right."""
    buffer = io.BytesIO()
    np.save(buffer, weights)
    manifest["files"]["weights.npy"] = sha256(buffer.getvalue()).hexdigest()
    written = json.dumps(manifest).encode()
    target = path.with_name(f"sha256-{sha256(written).hexdigest()}")
    path.rename(target)
    (target / "manifest.json").write_bytes(written)
    (target / "weights.npy").write_bytes(buffer.getvalue())
    return target


@pytest.mark.parametrize("change", ["format", "too short", "too long", "float64", "not a number", "pickled"])
def test_a_well_hashed_checkpoint_that_is_wrong_inside_is_refused(
    saved: tuple[heads.Student, Path], change: str
) -> None:
    _, path = saved
    manifest = json.loads((path / "manifest.json").read_text())
    flat = np.load(path / "weights.npy")
    if change == "format":
        manifest["format"] = "somebody-elses-1"
    wrong = {
        "too short": flat[:-1],
        "too long": np.append(flat, flat[:1]),
        "float64": flat.astype(np.float64),
        "not a number": flat * np.float32("nan"),
        "pickled": flat.astype(object),
    }
    with pytest.raises(ConfigError, match=r"format|too few|damaged"):
        heads.load(forged(path, manifest, wrong.get(change, flat)))
