"""What is kept of a request has nothing in it that must not be kept; who asked and who answered do not notice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import feedback, imports, plugins, privacy
from apprentice.bulk import Bulk
from apprentice.config import Config, parse
from apprentice.engine import Apprentice
from apprentice.errors import ConfigError, IdempotencyConflict
from apprentice.imports import Found, Tally
from apprentice.privacy import Veil
from apprentice.stores import digest
from apprentice.testing.servers import asked, serve_openai
from apprentice.types import Answer, Example, Finding, Json, Store, Task, Version

type Configured = Callable[..., Config]

MAIL, CARD, KEY = "ann.canary@example.com", "4111 1111 1111 1111", "sk-" + "canary0123456789" * 2
COPY = """
tasks:
  - name: reply
    description: "Say where the answer to a mail goes"
    input_schema: {text: str}
    output_schema: {address: str, note: str}
    evaluator: exact_match
remote:
  provider: openai
  model: gpt-4o-mini
  base_url: BASE_URL
  allow_internal: true
  permission: {basis: "answers made up for tests", by: "the tests", date: "1970-01-01", scope: "*"}
local: {learn: "off"}
redaction: patterns
"""


def built(**given: Any) -> Veil:
    return Veil(plugins.build("redactors", "patterns", **given))


def files_with(folder: Path, *words: str) -> list[str]:
    """The files below a folder in which any of these words is."""
    every = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in every if any(word.encode() in path.read_bytes() for word in words)]


def a_reply(body: dict[str, Json]) -> Json:
    """A remote that finds the address, and repeats what it read."""
    text = asked(body)["text"]
    return {"address": next(word for word in text.split() if "@" in word), "note": f"read: {text}"}


async def opened(config: Config) -> Store:
    store: Store = plugins.build("stores", "sqlite", path=config.store.path)
    return store


# --- the veil ---------------------------------------------------------------------------------------------------------


def test_a_value_has_one_name_within_a_request_in_the_order_of_the_sorted_keys() -> None:
    veil = built()
    hidden = veil.hide({"b": f"not bob@example.com but {MAIL}", "a": f"{MAIL} paid with {CARD}"})
    assert hidden == {"a": "<EMAIL_1> paid with <CARD_1>", "b": "not <EMAIL_2> but <EMAIL_1>"}
    assert veil.hide([f"{MAIL} and cat@example.com", {MAIL: 1}]) == ["<EMAIL_1> and <EMAIL_3>", {"<EMAIL_1>": 1}]
    assert built().hide({"a": f"{MAIL} paid with {CARD}", "b": f"not bob@example.com but {MAIL}"}) == hidden


def test_a_placeholder_that_somebody_wrote_stays_what_it_is() -> None:
    veil = built()
    text = f"<EMAIL_1> is no address, {MAIL} is"
    assert veil.hide(text) == "<EMAIL_1> is no address, <EMAIL_2> is"
    assert veil.show("<EMAIL_1> <EMAIL_2> <EMAIL_3>") == f"<EMAIL_1> {MAIL} <EMAIL_3>"


def test_what_was_found_once_is_replaced_wherever_it_occurs() -> None:
    veil = Veil(lambda text: [Finding(4, 8, "NAME")] if text.startswith("Mrs ") else [])
    assert veil.hide(["Mrs Anna wrote", "so Anna says"]) == ["Mrs <NAME_1> wrote", "so <NAME_1> says"]


def test_without_a_redactor_nothing_is_changed_but_the_subject() -> None:
    veil = Veil(None)
    assert not veil and veil.hide({"text": MAIL}) == {"text": MAIL} and veil.show("<EMAIL_1>") == "<EMAIL_1>"
    assert veil.tags({"subject": "ann", "channel": "mail"}) == {"subject": digest("ann"), "channel": "mail"}


async def test_a_redactor_reads_the_input_in_a_thread() -> None:
    readers: list[int] = []

    def note(text: str) -> list[Finding]:
        readers.append(threading.get_ident())
        return [Finding(0, 3, "NAME")]

    short, long = ["Ann wrote"], ["Ann wrote " * 1000]
    here = threading.get_ident()
    assert (await privacy.veil_for(note, short)).hide(short) == ["<NAME_1> wrote"]
    assert (await privacy.veil_for(note, long)).hide(long) == ["<NAME_1> wrote " * 1000]
    assert len(readers) == 2 and here not in readers
    assert not await privacy.veil_for(None, long)


def json_of(*words: str) -> st.SearchStrategy[Json]:
    said = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(words)), max_size=6).map(" ".join)
    return st.recursive(
        st.one_of(said, st.none(), st.booleans(), st.integers()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(said, inner, max_size=3),
        max_leaves=8,
    )


@given(
    asked=json_of(MAIL, CARD, "bob@example.com", "<EMAIL_1>", "<CARD_2>", KEY),
    answered=json_of(MAIL, CARD, "cat@example.com", KEY),
)
@settings(max_examples=60, deadline=None)
def test_what_is_hidden_can_be_shown_again_and_says_nothing_itself(asked: Json, answered: Json) -> None:
    veil = built()
    hidden = [veil.hide(asked), veil.hide(answered)]
    assert [veil.show(part) for part in hidden] == [asked, answered]
    assert not any(word in json.dumps(hidden) for word in (MAIL, CARD, KEY))
    again = built()
    assert [again.hide(asked), again.hide(answered)] == hidden  # the same for the same
    assert veil.hide(hidden[0]) == hidden[0]


# --- a request --------------------------------------------------------------------------------------------------------


async def test_the_remote_and_the_caller_have_the_original_and_the_store_does_not(tmp_path: Path) -> None:
    async with serve_openai(a_reply) as server:
        config = parse(COPY.replace("BASE_URL", server.url), tmp_path / "apprentice.yaml")
        async with Apprentice(config) as app:
            input = {"text": f"please answer {MAIL} about card {CARD}"}
            tags = {"subject": MAIL, "by": MAIL}
            result = await app.arun("reply", input, idempotency_key="k", tags=tags)
            again = await app.arun("reply", input, idempotency_key="k")
            with pytest.raises(IdempotencyConflict):
                await app.arun("reply", {"text": "please answer bob@example.com about card"}, idempotency_key="k")
            record = await app._store.record(result.request_id)
            assert files_with(tmp_path, MAIL, CARD) == []  # also while it is open, with its log
    assert asked(server.requests[0].body) == input and len(server.requests) == 1
    assert result.output == {"address": MAIL, "note": f"read: {input['text']}"} == again.output
    assert record is not None and record.input == {"text": "please answer <EMAIL_1> about card <CARD_1>"}
    assert record.remote is not None and record.remote.text == ""
    assert record.remote.output == {"address": "<EMAIL_1>", "note": f"read: {record.input['text']}"}
    assert record.tags == {"subject": digest(MAIL), "by": "<EMAIL_1>"}
    assert files_with(tmp_path, MAIL, CARD) == []


class Copies:
    """A student that has learned to say which placeholder is an address, and that sees nothing else."""

    def __init__(self) -> None:
        self.asked: list[Json] = []

    async def answer(self, task: Task, input: Json) -> Answer:
        self.asked.append(input)
        address = next((word for word in input["text"].split() if word.startswith("<EMAIL_")), "none")
        return Answer(output={"address": address, "note": f"read: {input['text']}"}, confidence=0.9)

    async def close(self) -> None:
        return None


async def test_the_student_is_asked_as_it_was_taught_and_its_answer_is_put_back(tmp_path: Path) -> None:
    async with serve_openai(a_reply) as server:
        config = parse(COPY.replace("BASE_URL", server.url), tmp_path / "apprentice.yaml")
        store = await opened(config)
        made = {"task": "reply", "checkpoint": "c", "path": "/c", "trained_on": 9, "created_at": 1.0}
        await store.add_version(Version(id="v1", state="candidate", metrics={"confidences": [0.1] * 9}, **made))
        await store.promote("reply", "v1", 1.0)
        await store.close()
        student = Copies()
        async with Apprentice(config, seed=1) as app:
            live = await app._live("reply")
            live.shelf._build = lambda version: student
            live.champion = None
            results = [await app.arun("reply", {"text": f"write to ann{i}.canary@example.com now"}) for i in range(4)]
            records = [record for _, record in await app._store.records("reply")]
        assert student.asked == [{"text": "write to <EMAIL_1> now"}] * len(student.asked) and student.asked
        both = [record for record in records if record.local is not None]
        assert len(both) == len(student.asked)
        for record in both:
            assert record.local is not None and record.local.output == {
                "address": "<EMAIL_1>",
                "note": "read: write to <EMAIL_1> now",
            }
            assert record.score is not None and record.score.value == 1.0  # both were compared with their words
        assert [result.output["address"] for result in results] == [f"ann{i}.canary@example.com" for i in range(4)]
    assert files_with(tmp_path, ".canary@") == []


async def test_what_goes_wrong_is_kept_without_the_words_too(tmp_path: Path) -> None:
    def refuses(body: dict[str, Json]) -> Json:
        return f"I cannot write to {MAIL}, see {KEY}"

    async with serve_openai(refuses) as server:
        config = parse(COPY.replace("BASE_URL", server.url), tmp_path / "apprentice.yaml")
        async with Apprentice(config) as app:
            with pytest.raises(Exception, match=r"."):
                await app.arun("reply", {"text": f"write to {MAIL}"})
    assert files_with(tmp_path, MAIL, KEY) == []


async def test_corrections_are_kept_without_them(tmp_path: Path) -> None:
    async with serve_openai(a_reply) as server:
        config = parse(COPY.replace("BASE_URL", server.url), tmp_path / "apprentice.yaml")
        async with Apprentice(config) as app:
            result = await app.arun("reply", {"text": f"write to {MAIL}"})
            right = {"address": MAIL, "note": "nothing else"}
            said = await app.afeedback(result.request_id, corrected=right, comment=f"ask {MAIL}")
            assert said.target == {"address": "<EMAIL_1>", "note": "nothing else"} and said.comment == "ask <EMAIL_1>"
            assert await feedback.give(config, app._store, result.request_id, "corrected", at=9.0, target=right) == said
    assert files_with(tmp_path, MAIL) == []


async def test_imported_rows_are_kept_without_them_and_can_be_taken_back(tmp_path: Path) -> None:
    config = parse(COPY.replace("BASE_URL", "http://127.0.0.1:9"), tmp_path / "apprentice.yaml")
    task = config.task("reply")
    row = Example(
        input={"text": f"write to {MAIL}"},
        target={"address": MAIL, "note": ""},
        source="gold",
        request_id="import-1",
    )
    store = await opened(config)
    try:
        await imports.keep(store, task, [Found("1", row)], Tally(config, task, (), date(2026, 11, 21)))
        kept = await store.examples("reply")
        assert [example.input for example in kept] == [{"text": "write to <EMAIL_1>"}]
        assert [example.target for example in kept] == [{"address": "<EMAIL_1>", "note": ""}]
        assert files_with(tmp_path, MAIL) == []
        assert await imports.take_back(store, task, [Found("1", row)]) == 1
    finally:
        await store.close()


async def test_a_batch_asks_with_what_is_kept(tmp_path: Path) -> None:
    def answer(body: dict[str, Json]) -> Json:
        return {"address": "none", "note": asked(body)["text"]}

    async with serve_openai(answer) as server:
        config = parse(COPY.replace("BASE_URL", server.url), tmp_path / "apprentice.yaml")
        store = await opened(config)
        bulk = Bulk(config, store, clock=lambda: 1_000_000.0, owner="us")
        await bulk.open()
        try:
            plan = await bulk.plan("reply", [{"text": f"write to {MAIL}"}, {"text": "write to bob.canary@example.com"}])
            assert plan.size == 1 and plan.repeated == 1  # the same question, once nobody knows whom it is about
            await bulk.send(plan)
            while not (records := await store.records("reply")):
                await bulk.collect()
            assert [record.input for _, record in records] == [{"text": "write to <EMAIL_1>"}]
        finally:
            await bulk.close()
            await store.close()
    assert all(MAIL not in json.dumps(seen.body) for seen in [*server.requests, *server.batched])
    assert files_with(tmp_path, MAIL, "bob.canary@") == []


# --- the configuration ------------------------------------------------------------------------------------------------


def test_a_task_may_redact_otherwise_or_not_at_all(configured: Configured) -> None:
    config = configured()
    assert privacy.redactor(config, config.task("sort")) is None
    text = COPY.replace("BASE_URL", "http://127.0.0.1:9")
    everywhere = parse(text)
    assert privacy.redactor(everywhere, everywhere.task("reply")) is not None
    off = parse(text.replace("    evaluator: exact_match\n", "    evaluator: exact_match\n    redaction: false\n"))
    assert privacy.redactor(off, off.task("reply")) is None and privacy.redactor(off) is not None
    assert Config.model_validate_json(off.model_dump_json()) == off


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("pattern", "did you mean 'patterns'"),
        ("{name: patterns, settings: {kind: [card]}}", "has no setting 'kind'; did you mean 'kinds'"),
        ("{name: patterns, settings: {kinds: [visa]}}", "kinds.0"),
        ("7", "redaction: should be an object"),
    ],
)
def test_what_is_wrong_with_a_redaction_is_said_with_its_place(written: str, said: str) -> None:
    text = COPY.replace("BASE_URL", "http://127.0.0.1:9").replace("redaction: patterns", f"redaction: {written}")
    with pytest.raises(ConfigError, match="redaction") as caught:
        parse(text)
    assert said in str(caught.value)
