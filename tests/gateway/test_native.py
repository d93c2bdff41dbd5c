"""The interface of our own, and whatever operates it."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice import jobs
from apprentice.gateway.desk import Pace
from apprentice.learn import learn
from apprentice.types import Json, Lease

from ..conftest import right, texts
from ..test_learn import answered
from .conftest import Live, Serving

INPUT = {"text": "please look at the hammer number 1"}


async def ran(live: Live, input: Json = INPUT, **headers: str) -> dict[str, Json]:
    answer = await live.client.post("/v1/tasks/sort/run", json={"input": input}, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Json] = answer.json()
    return found


async def test_one_input_is_answered_with_who_and_why_and_at_what_cost(serving: Serving) -> None:
    async with serving() as live:
        answer = await live.client.post("/v1/tasks/sort/run", json={"input": INPUT, "tags": {"team": "a"}})
        [record] = await live.records()
    assert answer.json() == {
        "output": {"kind": "tool"},
        "source": "remote",
        "request_id": record.request_id,
        "version": None,
        "confidence": None,
        "phase": "cold_start",
        "reason": "no_local_model",
        "cost_usd": record.cost / 1e6,
    }
    assert record.tags == {"team": "a", "key": "tests"}
    assert answer.headers["x-request-id"] == record.request_id


async def test_of_a_batch_each_input_is_a_request_of_its_own(serving: Serving) -> None:
    async with serving() as live:
        inputs = [{"text": "a pear"}, {"text": ""}, {"words": 1}, {"text": "an otter"}]
        answer = await live.client.post("/v1/tasks/sort/batch", json={"inputs": inputs})
        results = answer.json()["results"]
        assert len(await live.records()) == 2
    assert [(one["result"] or {}).get("output") for one in results] == [
        {"kind": "fruit"},
        None,
        None,
        {"kind": "animal"},
    ]
    assert [(one["error"] or {}).get("param") for one in results] == [None, "inputs[1]", "inputs[2]", None]
    assert float(answer.headers["x-apprentice-cost-usd"]) > 0


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/tasks/sotr/run", {"input": INPUT}, 404, "name"),
        ("/v1/tasks/sort/run", {}, 400, "input"),
        ("/v1/tasks/sort/run", {"input": {"text": 5}}, 400, "input"),
        ("/v1/tasks/sort/run", {"input": INPUT, "tags": {"a": 1}}, 400, "tags"),
        ("/v1/tasks/sort/batch", {"inputs": []}, 400, "inputs"),
        ("/v1/tasks/sort/promote", {"version": "v9"}, 404, "version"),
        ("/v1/tasks/sort/rollback", {}, 409, None),
        ("/v1/tasks/sort/mode", {"mode": "local"}, 400, "mode"),
        ("/v1/tasks/sort/mode", {"mode": "auto", "seconds": 5}, 400, "seconds"),
        ("/v1/tasks/sort/mode", {"mode": "remote", "seconds": -1}, 400, "seconds"),
        ("/v1/feedback", {"request_id": "nobody", "metric_name": "approved", "value": True}, 404, "request_id"),
        ("/v1/feedback", {"request_id": "nobody", "metric_name": "comment", "value": "x"}, 404, "request_id"),
    ],
)
async def test_what_cannot_be_done_is_told_with_the_field(
    serving: Serving, path: str, body: Json, status: int, param: str | None
) -> None:
    async with serving() as live:
        answer = await live.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["param"] == param or (error["param"] or "").startswith(f"{param}.")


async def test_a_demonstration_becomes_gold_once_and_can_be_withdrawn(serving: Serving) -> None:
    async with serving() as live:
        number = (await ran(live))["request_id"]

        async def say(metric: str, value: Json, comment: str = "") -> tuple[int, Json]:
            body = {"request_id": number, "metric_name": metric, "value": value, "comment": comment}
            answer = await live.client.post("/v1/feedback", json=body)
            return answer.status_code, answer.json()

        status, first = await say("demonstration", {"kind": "animal"}, "look again")
        assert (status, first["task"]) == (200, "sort")
        assert await say("demonstration", {"kind": "animal"}, "look again") == (status, first)
        [said] = await live.store.corrections("sort")
        assert (said.action, said.target, said.by, said.comment) == (
            "corrected", {"kind": "animal"}, "key:tests", "look again",
        )  # fmt: skip
        status, told = await say("demonstration", {"kind": "stone"})
        assert (status, told["error"]["param"]) == (400, "value")
        assert (await say("withdrawn", True))[0] == 200
        assert (await say("withdrawn", True))[0] == 400
        assert (await say("approved", True))[0] == 200
        assert (await say("approved", False))[0] == 400
        assert [one.action for one in await live.store.corrections("sort")] == ["corrected", "withdrawn", "approved"]


async def test_a_comment_and_a_metric_of_ones_own_are_kept_once_and_decide_nothing(serving: Serving) -> None:
    async with serving() as live:
        number = (await ran(live))["request_id"]
        for metric, value in (("comment", "odd"), ("comment", "odd"), ("stars", 4), ("stars", 5)):
            body = {"request_id": number, "metric_name": metric, "value": value}
            assert (await live.client.post("/v1/feedback", json=body)).status_code == 200
        kept = [event.evidence["value"] for event in await live.store.events("sort", names=["FEEDBACK"])]
        wrong = {"request_id": number, "metric_name": "stars", "value": {"of": 5}}
        assert (await live.client.post("/v1/feedback", json=wrong)).status_code == 400
        assert sorted(map(str, kept)) == ["4", "5", "odd"]
        assert await live.store.corrections("sort") == []


def test_a_minutes_allowance_is_filled_up_evenly() -> None:
    pace = Pace(60)
    assert [pace.take("a", 0.0) for _ in range(61)] == [True] * 60 + [False]
    assert pace.take("b", 0.0)
    assert [pace.take("a", 1.5), pace.take("a", 1.5), pace.take("a", 2.0)] == [True, False, True]


async def test_feedback_comes_at_the_pace_of_people(serving: Serving) -> None:
    async with serving() as live:
        number = (await ran(live))["request_id"]
        live.gateway.pace = Pace(2)
        body = {"request_id": number, "metric_name": "approved", "value": True}
        answers = [await live.client.post("/v1/feedback", json=body) for _ in range(5)]
        assert [answers[0].status_code, answers[-1].status_code] == [200, 429]
        assert answers[-1].headers["retry-after"] == "1"


async def test_the_mode_is_shared_and_shown(serving: Serving) -> None:
    async with serving() as live:
        answer = await live.client.post("/v1/tasks/sort/mode", json={"mode": "remote", "seconds": 60})
        assert answer.json() == {"task": "sort", "mode": "remote", "seconds": 60.0}
        [status] = (await live.client.get("/v1/status")).json()["tasks"]
        assert status["mode"]["mode"] == "remote"
        assert (await live.client.get("/v1/tasks/sort/status")).json()["mode"] == status["mode"]


async def test_a_training_that_goes_on_is_shown(serving: Serving) -> None:
    async with serving() as live:
        into = live.config.local.model_dir / "sort"
        into.mkdir(parents=True)
        with jobs.shown(into, trainer="unsloth", since=5.0, lease=Lease("learn/sort", "tests", 1, 0.0)):
            [status] = (await live.client.get("/v1/status")).json()["tasks"]
            assert (status["training"]["trainer"], status["training"]["since"]) == ("unsloth", 5.0)
            assert (await live.client.get("/v1/tasks/sort/status")).json()["training"] == status["training"]
        assert (await live.client.get("/v1/tasks/sort/status")).json()["training"] is None


async def test_what_a_subject_said_is_erased_by_who_may_operate(serving: Serving, tmp_path: Path) -> None:
    def has(words: str) -> bool:
        return any(words.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    async with serving() as live:
        tag, question = {"x-apprentice-tag-subject": "ann"}, '{"text": "an apple, no kumquat"}'
        for path, body in (
            ("/v1/tasks/sort/run", {"input": {"text": "the apple of a kumquat"}}),
            ("/v1/chat/completions", {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": question}]}),
        ):
            assert (await live.client.post(path, json=body, headers=tag)).status_code == 200, path
        caller = await live.new_key("caller", "call", "feedback")
        refused = await live.client.post(
            "/v1/erase", json={"subject": "ann"}, headers={"authorization": f"Bearer {caller}"}
        )
        assert refused.status_code == 403 and has("kumquat")
        told = (await live.client.post("/v1/erase", json={"subject": "ann", "dry_run": True})).json()
        assert {one["task"]: one["records"] for one in told["erased"]} == {"passthrough": 1, "sort": 1} and has(
            "kumquat"
        )
        assert (await live.client.post("/v1/erase", json={"subject": "ann"})).json() == told | {"dry_run": False}
        assert not has("kumquat")
        assert (await live.client.post("/v1/erase", json={"subject": "ann"})).json()["erased"] == []
        assert (await live.client.post("/v1/erase", json={"subject": ""})).status_code == 400


async def test_versions_are_listed_promoted_and_rolled_back_with_who_and_why(serving: Serving) -> None:
    async with serving() as live:
        for number, text in enumerate(texts(60)):
            await live.store.append(answered(number, text, right(text)))
        await learn(live.config, "sort", live.store, clock=lambda: 1.0, owner="a", force=True)
        await learn(live.config, "sort", live.store, clock=lambda: 2.0, owner="a", force=True)
        path = "/v1/tasks/sort"
        found = (await live.client.get(f"{path}/versions")).json()
        assert [(one["id"], one["tainted"]) for one in found["versions"]] == [("v1", False), ("v2", False)]
        assert "confidences" not in found["versions"][0]["metrics"]
        before = len(found["history"])
        for version in ("v1", "v2"):
            answer = await live.client.post(f"{path}/promote", json={"version": version, "why": "better"})
            assert (answer.status_code, answer.json()["state"]) == (200, "champion"), answer.text
        back = await live.client.post(f"{path}/rollback", json={"why": "worse"})
        assert (back.json()["id"], back.json()["state"]) == ("v1", "champion")
        history = (await live.client.get(f"{path}/versions")).json()["history"][before:]
        answer = await live.client.post(f"{path}/run", json={"input": {"text": "a pear"}})
        assert answer.headers["x-apprentice-phase"] == "reinforcement"
    changes = [(one["version"], one["by"], one["why"]) for one in history]
    assert changes[-2:] == [("v2", "key:tests", "better"), ("v1", "key:tests", "worse")]
