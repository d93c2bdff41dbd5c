from __future__ import annotations

from random import Random
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.promotion import (
    MARGIN,
    PART_MARGIN,
    PART_ROWS,
    PATIENCE,
    HeldOut,
    Measured,
    Ramp,
    Trial,
    fingerprint,
    held_out,
    judge,
    measures,
    on,
    screen,
)
from apprentice.types import METRICS, Evidence, Gate, Promotion

scores = st.lists(st.floats(0, 1), min_size=2, max_size=60)


@given(scores)
def test_the_first_version_is_always_promoted(candidate: list[float]) -> None:
    assert screen(candidate, None).promote


@given(scores)
def test_an_equal_candidate_is_promoted(found: list[float]) -> None:
    assert screen(found, found).promote


def test_a_clearly_worse_candidate_is_rejected_with_the_gap() -> None:
    found = screen([1.0] * 60 + [0.0] * 40, [1.0] * 90 + [0.0] * 10)
    assert not found.promote
    assert "0.300" in found.reason


def test_a_loss_within_two_standard_errors_is_no_reason_to_reject() -> None:
    assert screen([1.0] * 18 + [0.0] * 2, [1.0] * 19 + [0.0]).promote


def test_too_few_rows_reject_nobody() -> None:
    assert screen([0.0], [1.0]).promote
    assert screen([], []).promote


@given(st.text())
def test_case_and_white_space_do_not_move_an_input_between_training_and_hold_out(text: str) -> None:
    assert fingerprint({"text": f" {text} "}) == fingerprint({"text": f"  {text}\n "})


def test_one_input_in_ten_is_held_out() -> None:
    share = sum(held_out(fingerprint({"text": f"request {i}"})) for i in range(5000)) / 5000
    assert 0.085 <= share <= 0.115


# --- the examination


def measured(scores: list[float], **more: Any) -> Measured:
    said = [str(row) if score else "wrong" for row, score in enumerate(scores)]
    return Measured(scores=scores, said=more.pop("said", said), **more)


def rows(n: int, **more: Any) -> HeldOut:
    return HeldOut([str(row) for row in range(n)], **more)


GOOD = [1.0] * 95 + [0.0] * 5
HARD = range(80, 100)


@pytest.mark.parametrize(
    ("candidate", "champion", "held", "gate", "said"),
    [
        (
            measured(GOOD),
            measured(GOOD),
            rows(100),
            "agreement >= 0.96",
            "gate agreement >= 0.96: it is 0.95, 0.01 less",
        ),
        (measured(GOOD), None, rows(100), "gold_agreement >= 0.5", "not measured"),
        (measured(GOOD, latencies=[0.02]), None, rows(100), "p95_latency_ms <= 10", "it is 20, 10 more"),
        (
            measured([1.0] * 82 + [0.0] * 18),
            measured([1.0] * 70 + [0.0] * 12 + [1.0] * 18),
            rows(100, slices={"channel=mail": HARD}),
            None,
            "slice channel=mail: worse than the champion by 0.800 on 20 held-out rows (allowed:",
        ),
        (
            measured(GOOD, fields={"kind": [0.0] * 50 + [1.0] * 50}),
            measured(GOOD, fields={"kind": [1.0] * 100}),
            rows(100),
            None,
            "field kind: worse than the champion by 0.500",
        ),
        (
            measured(GOOD, latencies=[0.1] * 30),
            measured(GOOD, latencies=[0.01] * 30),
            rows(100),
            None,
            "latency: p95 is 100.0 ms, the champion's 10.0 (allowed: 20.0)",
        ),
        (measured(GOOD, cost=3.0), measured(GOOD, cost=2.0), rows(100), None, "cost: 3.0 micro-dollars"),
    ],
)
def test_a_refusal_names_the_gate_and_the_gap(
    candidate: Measured, champion: Measured | None, held: HeldOut, gate: str | None, said: str
) -> None:
    found = judge(candidate, champion, held, gates=[Gate.parse(gate)] if gate else [])
    assert not found.promote and said in found.reason
    assert gate is not None or judge(candidate, None, held).promote  # it is the comparison that it fails


def test_what_passes_every_gate_is_promoted_where_the_hold_out_may_decide_and_else_tried_out() -> None:
    same, gate = measured(GOOD, latencies=[0.01]), [Gate.parse("json_validity >= 0.98")]
    assert judge(same, same, rows(100), gates=gate)[0::5] == (True, False)
    assert judge(same, same, rows(100), gates=gate, holdout_decides=False)[0::5] == (True, True)
    assert judge(same, None, rows(100), holdout_decides=False)[0::5] == (True, False)


def test_a_candidate_that_lost_what_was_known_first_is_refused_by_the_frozen_hold_out() -> None:
    same = measured(GOOD)
    assert judge(same, same, rows(100), frozen=([1.0] * 95 + [0.0] * 5, [1.0] * 100)).promote  # within the margin
    found = judge(same, same, rows(100), frozen=([1.0] * 80 + [0.0] * 20, [1.0] * 100))
    assert not found.promote
    assert found.reason.startswith("the frozen hold-out: worse than the champion by 0.200 on 100 held-out rows")
    assert judge(same, same, rows(100), frozen=([0.0] * 9, [1.0] * 9)).promote  # so few say nothing


@pytest.mark.parametrize(
    ("right", "before", "gold", "gap"),
    [
        (19, 20, 20, None),  # within a part's margin
        (18, 20, 20, None),  # 0.1, and two standard errors are 0.138
        (15, 20, 20, "0.250 on 20 held-out rows (allowed: 0.199)"),
        (0, 10, 10, "1.000 on 10 held-out rows (allowed: 0.050)"),
        (0, 9, 9, None),  # so few say nothing
        (20, 15, 20, None),
        (936, 1000, 1000, "0.064 on 1000 held-out rows (allowed: 0.050)"),
        (960, 1000, 1000, None),  # clear, and small
    ],
)
def test_a_candidate_that_is_worse_on_gold_is_refused_however_much_better_it_is_elsewhere(
    right: int, before: int, gold: int, gap: str | None
) -> None:
    """`right` and `before`: of the gold rows. Of the others the candidate knows all, and the champion none."""
    others = 2 * gold
    candidate = measured([1.0] * right + [0.0] * (gold - right) + [1.0] * others)
    champion = measured([1.0] * before + [0.0] * (gold - before) + [0.0] * others)
    found = judge(candidate, champion, rows(3 * gold, gold=range(gold)))
    assert found.candidate > (found.champion or 0.0)
    assert found.promote == (gap is None)
    assert gap is None or found.reason == f"gold: worse than the champion by {gap}"
    assert judge(candidate, champion, rows(3 * gold)).promote and judge(candidate, None, rows(3 * gold)).promote


def test_gold_is_named_before_all_other_reasons() -> None:
    candidate, champion = measured([0.0] * 100, cost=3.0, fields={"kind": [0.0] * 100}), measured([1.0] * 100, cost=1.0)
    held = rows(100, slices={"channel=mail": HARD}, gold=HARD)
    found = judge(candidate, champion, held, gates=[Gate.parse("agreement >= 0.5")], frozen=([0.0] * 20, [1.0] * 20))
    reasons = [reason.partition(":")[0] for reason in found.reason.split("; ")]
    assert reasons[0] == "gold" and reasons[1].startswith("worse than the champion")
    assert reasons[2:] == ["gate agreement >= 0.5", "slice channel=mail", "the frozen hold-out", "cost"]


pairs = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=40)
losses = st.lists(st.sampled_from([(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]), min_size=PART_ROWS, max_size=40)


@settings(deadline=None)
@given(losses | pairs, pairs)
def test_gold_refuses_for_a_loss_on_enough_gold_rows_beyond_the_margin_and_else_changes_nothing(
    gold: list[tuple[float, float]], others: list[tuple[float, float]]
) -> None:
    candidate, champion = (measured([pair[side] for pair in [*gold, *others]]) for side in (0, 1))
    found = judge(candidate, champion, rows(len(candidate.scores), gold=range(len(gold))))
    without = judge(candidate, champion, rows(len(candidate.scores)))
    lost = [old - new for new, old in gold]
    if len(gold) >= PART_ROWS and fmean(lost) > max(PART_MARGIN, 2 * stdev(lost) / len(lost) ** 0.5):
        said = f"gold: worse than the champion by {fmean(lost):.3f} on {len(gold)} held-out rows"
        assert not found.promote and found.reason.startswith(said)
        assert without.promote or found.reason.endswith(f"; {without.reason}")
    else:
        assert found == without


def test_what_was_measured_on_some_rows_is_what_those_rows_say() -> None:
    found = on(measured(GOOD, fields={"kind": GOOD}, latencies=[0.1], cost=2.0), range(90, 100))
    assert (sum(found.scores), len(found.said), sum(found.fields["kind"])) == (5, 10, 5)
    assert (found.latencies, found.cost) == ([0.1], 2.0)


def test_one_slow_answer_is_not_a_slower_version() -> None:
    hiccup = measured(GOOD, latencies=[0.01] * 28 + [1.0, 1.0])
    assert judge(hiccup, measured(GOOD, latencies=[0.01] * 30), rows(100)).promote


@pytest.mark.parametrize("text", ["agreement > 0.9", "agreement >= much", "beauty >= 1", "", "agreement >= 0.9 or so"])
def test_a_gate_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no gate such as|known: agreement"):
        Gate.parse(text)


def test_a_student_that_is_merely_imperfect_does_not_trip_the_tripwire_and_one_that_collapsed_does() -> None:
    false = caught = 0
    for seed in range(12):
        dice = Random(seed)
        words = [f"w{n}" for n in range(400)]
        expected = [" ".join(dice.choices(words, k=9)) for _ in range(200)]
        worse = [text if dice.random() < 0.95 else " ".join(dice.choices(words, k=9)) for text in expected]
        template = [
            text
            if dice.random() < 0.7
            else f"Thank you for {dice.choice(words)}, we shall look into it as soon as we can"
            for text in expected
        ]
        held = HeldOut(expected)
        false += not judge(Measured([1.0] * 200, worse), None, held).promote
        found = judge(Measured([1.0] * 200, template), None, held)
        caught += not found.promote and "diversity" in found.reason
    assert (false, caught) == (0, 12)


def test_few_labels_are_as_many_as_were_expected_unless_one_swallows_the_others() -> None:
    dice = Random(1)
    expected = dice.choices("abcdefgh", k=400)
    noisy = [label if dice.random() < 0.9 else dice.choice("abcdefgh") for label in expected]
    assert judge(Measured([1.0] * 400, noisy), None, HeldOut(expected)).promote
    swallowed = [label if dice.random() < 0.5 else "a" for label in expected]
    found = judge(Measured([1.0] * 400, swallowed), None, HeldOut(expected))
    assert "the commonest answer" in found.reason


def test_everything_that_was_measured_is_named() -> None:
    held = rows(100, slices={"a=1": HARD}, gold=(0, 1, 99))
    found = measures(measured(GOOD, latencies=[0.001 * n for n in range(1, 101)], size=5_000_000), held)
    assert found["agreement"] == 0.95 and found["gold_agreement"] == pytest.approx(2 / 3)
    assert found["slices"] == {"a=1": {"n": 20, "agreement": 0.75}}
    assert [found[f"p{share}_latency_ms"] for share in (50, 95, 99)] == pytest.approx([50, 95, 99])
    assert set(METRICS) <= set(found)


# --- the trial


def trial(mean: float, seed: int, spread: float = 0.06) -> Trial:
    """A trial to its end; the canary's score differs on a share `spread` of the audits, by `mean` on average."""
    dice, found = Random(seed), Trial("v2", 1)
    while found.verdict is None:
        coin = dice.random()
        found.observe(1.0 if coin < (spread + mean) / 2 else -1.0 if coin < spread else 0.0)
    return found


@pytest.mark.parametrize("trials", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_a_canary_that_is_worse_by_the_margin_is_promoted_in_one_of_twenty_trials_at_most(trials: int) -> None:
    assert sum(trial(-MARGIN, seed).verdict == "promote" for seed in range(trials)) <= trials // 10  # half is expected


def test_a_better_canary_gets_through_and_a_much_worse_one_is_dropped_soon() -> None:
    better = [trial(0.03, seed) for seed in range(40)]
    assert sum(found.verdict == "promote" for found in better) >= 39
    assert sorted(found.audits for found in better)[37] <= 700
    worse = [trial(-0.3, seed, spread=0.4) for seed in range(40)]
    assert {found.verdict for found in worse} == {"drop"}
    assert max(found.audits for found in worse) <= 150


def test_a_trial_without_a_verdict_ends() -> None:
    found = Trial("v2", 1)
    said = [found.observe(1.0 if n % 7 == 0 else -1.0 if n % 7 == 3 else -0.02) for n in range(PATIENCE)]
    assert found.verdict == "drop" and said[-1] is not None and "no verdict" in said[-1].message


@given(st.lists(st.floats(-1, 1), max_size=200))
def test_wealth_is_never_negative_and_the_share_only_rises_until_the_verdict(differences: list[float]) -> None:
    found, share = Trial("v2", 1), 0.05
    for difference in differences:
        said = found.observe(difference)
        assert min(*found.gains, *found.losses) >= 0
        assert found.share >= share or found.verdict == "drop"
        assert said is None or said.evidence["audits"] == found.audits
        share = found.share
    assert share in (0.0, 0.05, 0.25, 0.5, 1.0)


def audit(
    seq: int, rival: float | None, of: str | None = "v2", score: float | None = 1.0, audit: bool = True
) -> Evidence:
    return Evidence(seq, "t", 0.0, "v1", 0.0, 0.1, audit, 0.9, score, "remote", None, None, rival, of)


STARTED = [Promotion(1, "t", "v1", 0), Promotion(2, "t", "v2", 3, "canary")]


def test_only_audits_that_the_canary_of_today_answered_count() -> None:
    ramp = Ramp()
    history = [audit(1, 1.0), audit(4, 1.0, "v3"), audit(5, None, None), audit(6, 1.0, audit=False), audit(7, 0.0)]
    assert list(ramp.fold(history, STARTED)) == []
    assert ramp.trial is not None and (ramp.trial.audits, ramp.trial.difference) == (1, -1.0)
    assert list(ramp.fold([audit(8, 0.5, score=None)], STARTED)) == []  # a champion without a valid answer scores 0
    assert ramp.trial.difference == -0.5
    list(ramp.fold([audit(9, 1.0)], [*STARTED, Promotion(3, "t", "v1", 8, "champion")]))
    assert ramp == Ramp(number=3)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=80), st.integers(0, 80))
def test_folding_in_parts_and_at_once_arrives_at_the_same_trial(scores: list[float], cut: int) -> None:
    history = [audit(seq, score) for seq, score in enumerate(scores, start=1)]
    ended = [*STARTED, Promotion(3, "t", "v2", 60, "rejected"), Promotion(4, "t", "v2", 65, "canary")]
    whole, parts = Ramp(), Ramp()
    said = list(whole.fold(history, ended))
    again = list(parts.fold(history[:cut], [made for made in ended if made.after <= cut]))
    again += list(parts.fold(history[cut:], ended))
    assert (parts, again) == (whole, said)
