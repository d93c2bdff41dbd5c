"""The served pages: who is let in, what a form may change, and that nothing else can."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest

from apprentice import jobs
from apprentice.gateway import keys
from apprentice.types import Lease

from ..conftest import right, texts
from .conftest import EVIL, Live, Serving, history, record

PAGES = (
    "/dashboard",
    "/dashboard/tasks/sort",
    "/dashboard/tasks/sort/review",
    "/dashboard/tasks/sort/versions",
    "/dashboard/requests/r1",
)


async def filled(live: Live) -> None:
    await live.store.append(record(1, "a pear", local="tool", remote="fruit"))
    await live.store.append(record(2, "an otter", local="tool", remote="animal"))


async def test_without_a_session_every_page_leads_to_the_login(serving: Serving) -> None:
    async with serving() as live:
        await filled(live)
        for path in PAGES:
            answer = await live.browser.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/login"), path
            assert "pear" not in answer.text
        for path in ("/dashboard/requests/r1/say", "/dashboard/tasks/sort/versions/v1/promote", "/dashboard/logout"):
            assert (await live.post(path, action="approved")).headers["location"] == "/dashboard/login"
        assert await live.store.corrections("sort") == []


async def test_a_session_shows_every_page_with_headers_that_allow_no_foreign_code(serving: Serving) -> None:
    async with serving() as live:
        await filled(live)
        await live.login("feedback", "operate")
        for path in (*PAGES, "/dashboard/static/style.css", "/dashboard/static/keys.js"):
            answer = await live.browser.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"
            assert "style=" not in answer.text and "onclick" not in answer.text


async def test_the_page_of_a_task_says_that_it_is_trained(serving: Serving) -> None:
    async with serving() as live:
        await live.login("operate")
        into = live.config.local.model_dir / "sort"
        into.mkdir(parents=True)
        (into / ".training" / "a").mkdir(parents=True)
        (into / ".training" / "a" / "row.json").write_text('{"name": "a", "token": 1}')
        (into / ".training" / "a" / "progress.jsonl").write_text('{"step": 3, "steps": 8, "loss": 0.25, "eta": 7}\n')
        with jobs.shown(into, trainer="unsloth", since=5.0, lease=Lease("learn/sort", "tests", 1, 0.0)):
            page = (await live.browser.get("/dashboard/tasks/sort")).text
        assert "Training now: unsloth, since 1970-01-01 00:00 UTC, step 3 of 8, loss 0.25, about 7 s left" in page


async def test_the_cookie_is_for_no_script_no_other_site_and_not_the_key(serving: Serving) -> None:
    async with serving() as live:
        secret = await live.key("operate")
        answer = await live.post("/dashboard/login", key=secret)
        cookie = answer.headers["set-cookie"]
    assert all(part in cookie.lower() for part in ("httponly", "samesite=strict", "path=/dashboard"))
    assert secret not in cookie


@pytest.mark.parametrize("key", ["", "apk-nobody", "x" * 5_000])
async def test_what_is_no_key_begins_no_session(serving: Serving, key: str) -> None:
    async with serving() as live:
        answer = await live.post("/dashboard/login", key=key)
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers
    assert "apk-nobody" not in answer.text


async def test_a_key_that_may_only_call_sees_nothing(serving: Serving) -> None:
    async with serving() as live:
        answer = await live.post("/dashboard/login", key=await live.key("call"))
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


async def test_a_changed_or_foreign_cookie_is_no_session(serving: Serving) -> None:
    async with serving() as live:
        await live.login("operate")
        cookie = live.browser.cookies["apprentice_session"]
        live.browser.cookies.clear()
        within = (
            cookie[:-9] + ("a" if cookie[-9] != "a" else "b") + cookie[-8:]
        )  # the last one has bits that count for nothing
        for forged in (within, "x" + cookie, "WyJhIl0.a.b", ""):
            answer = await live.browser.get("/dashboard", headers={"cookie": f"apprentice_session={forged}"})
            assert answer.status_code == 303, forged
        answer = await live.browser.get("/dashboard", headers={"cookie": f"apprentice_session={cookie}"})
        assert answer.status_code == 200


async def test_a_revoked_key_ends_its_sessions_and_logging_out_ends_this_one(serving: Serving) -> None:
    async with serving() as live:
        await live.login("operate")
        answer = await live.post("/dashboard/logout", token=await live.token())
        assert answer.headers["location"] == "/dashboard/login"
        assert (await live.browser.get("/dashboard")).status_code == 303
        await live.login("operate")
        assert (await live.browser.get("/dashboard")).status_code == 200
        for key in await keys.known(live.store):
            await keys.revoke(live.store, key.id, at=2e9)
        assert (await live.browser.get("/dashboard")).status_code == 303


async def test_a_form_from_elsewhere_or_without_the_token_changes_nothing(serving: Serving) -> None:
    async with serving() as live:
        await filled(live)
        await live.login("feedback")
        path, token = "/dashboard/requests/r1/say", await live.token()
        for origin in ("http://evil.example", "null", "https://127.0.0.1:1"):
            assert (await live.post(path, origin=origin, token=token, action="approved")).status_code == 403
        assert (await live.post(path, origin="", token=token, action="approved")).status_code == 403
        for wrong in ("", "0" * 64, token[:-1]):
            assert (await live.post(path, token=wrong, action="approved")).status_code == 403
        headers = {"origin": live.url, "sec-fetch-site": "cross-site"}
        sent = {"token": token, "action": "approved"}
        assert (await live.browser.post(path, data=sent, headers=headers)).status_code == 403
        headers = {"origin": live.url, "content-type": "text/plain"}
        answer = await live.browser.post(path, content=f"token={token}&action=approved", headers=headers)
        assert answer.status_code == 415
        large = await live.post(path, token=token, action="corrected", target="x" * 1_200_000)
        assert large.status_code == 413
        assert await live.store.corrections("sort") == []


async def test_what_a_person_approves_corrects_and_takes_back_is_kept_with_the_name_of_the_key(
    serving: Serving,
) -> None:
    async with serving() as live:
        await filled(live)
        await live.login("feedback")
        path, token = "/dashboard/requests/r1/say", await live.token()
        for sent in (
            {"action": "approved"},
            {"action": "corrected", "target": '{"kind": "animal"}', "comment": EVIL},
            {"action": "withdrawn"},
        ):
            answer = await live.post(path, token=token, **sent)
            assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/requests/r1"), sent
            shown = (await live.browser.get("/dashboard/requests/r1")).text
            assert "<script>" not in shown
            assert (sent["action"] in shown) or sent["action"] == "withdrawn"
        words = await live.store.corrections("sort")
    assert [(one.action, one.target) for one in words] == [
        ("approved", {"kind": "fruit"}),
        ("corrected", {"kind": "animal"}),
        ("withdrawn", None),
    ]
    assert all(one.by.startswith("key:feedback") for one in words)
    assert words[1].comment == EVIL


@pytest.mark.parametrize("target", ["{", "", "null", '{"kind": "boat"}', '{"kind": NaN}', "[" * 100_000])
async def test_a_correction_that_does_not_fit_is_shown_again_with_the_reason(serving: Serving, target: str) -> None:
    async with serving() as live:
        await filled(live)
        await live.login("feedback")
        sent = {"token": await live.token(), "action": "corrected", "target": target, "comment": "because"}
        answer = await live.post("/dashboard/requests/r1/say", **sent)
        assert (answer.status_code, 'role="alert"' in answer.text, "because" in answer.text) == (400, True, True)
        assert await live.store.corrections("sort") == []


async def test_the_review_queue_goes_on_after_each_word_and_skips_without_one(serving: Serving) -> None:
    async with serving() as live:
        await filled(live)
        await live.login("feedback")
        path = "/dashboard/tasks/sort/review"
        shown = (await live.browser.get(path)).text
        assert "Waiting: 2. Judged: 0." in shown and "an otter" in shown
        assert "a pear" in (await live.browser.get(f"{path}?after=r2")).text
        assert "Nothing waits here" in (await live.browser.get(f"{path}?after=r1")).text
        target = json.dumps({"kind": "tool"})
        sent = {"token": await live.token(path), "back": path, "action": "corrected", "target": target}
        answer = await live.post("/dashboard/requests/r2/say", **sent)
        assert answer.headers["location"] == path
        shown = (await live.browser.get(path)).text
        assert "Waiting: 1. Judged: 1." in shown and "a pear" in shown


@pytest.mark.parametrize("back", ["https://evil.example/dashboard/", "//evil.example", "/dashboard/\\evil", "/v1", ""])
async def test_a_form_leads_back_to_our_own_pages_only(serving: Serving, back: str) -> None:
    async with serving() as live:
        await filled(live)
        await live.login("feedback")
        sent = {"token": await live.token(), "action": "approved", "back": back}
        answer = await live.post("/dashboard/requests/r1/say", **sent)
    assert answer.headers["location"] == "/dashboard/requests/r1"


async def test_roles_are_apart(serving: Serving) -> None:
    async with serving() as live:
        await filled(live)
        await live.login("operate")
        token = await live.token()
        assert (await live.browser.get("/dashboard/tasks/sort/review")).status_code == 403
        assert (await live.post("/dashboard/requests/r1/say", token=token, action="approved")).status_code == 403
        assert "Save as right" not in (await live.browser.get("/dashboard/requests/r1")).text
        live.browser.cookies.clear()
        await live.login("feedback")
        token = await live.token()
        path = "/dashboard/tasks/sort/versions/v1/promote"
        assert (await live.browser.get(path)).status_code == 403
        assert (await live.post(path, token=token)).status_code == 403
        assert await live.store.corrections("sort") == []


async def test_versions_are_promoted_and_rolled_back_after_a_confirmation(serving: Serving) -> None:
    async with serving() as live:
        await history(live.config, live.store)
        await live.login("operate")
        path = "/dashboard/tasks/sort/versions"
        before = len(await live.store.promotions("sort"))
        shown = (await live.browser.get(f"{path}/v2/promote")).text
        assert "Serve v2?" in shown
        assert len(await live.store.promotions("sort")) == before  # asking changes nothing
        token = await live.token()
        for version, how in (("v1", "promote"), ("v2", "promote"), ("v1", "rollback")):
            answer = await live.post(f"{path}/{version}/{how}", token=token, why=f"{how} {EVIL}")
            assert (answer.status_code, answer.headers["location"]) == (303, path), answer.text
        shown = (await live.browser.get(path)).text
        made = (await live.store.promotions("sort"))[-2:]
        assert [(one.version, one.state) for one in made] == [("v2", "champion"), ("v1", "champion")]
        assert all(one.by.startswith("key:operate") for one in made)
        assert "Roll back to v2" in shown and "<script>alert" not in shown
        for wrong in ("v9/promote", "v1/destroy", f"{EVIL}/promote"):
            answer = await live.post(f"{path}/{wrong}", token=token)
            assert (answer.status_code, "<script>alert" in answer.text) == (404, False)


@pytest.mark.parametrize("path", ["/dashboard/tasks/sotr", "/dashboard/requests/nobody", "/dashboard/tasks/x/review"])
async def test_what_there_is_not_is_a_page_that_says_so(serving: Serving, path: str) -> None:
    async with serving() as live:
        await live.login("feedback", "operate")
        answer = await live.browser.get(path)
    assert (answer.status_code, "<h1>Not found</h1>" in answer.text) == (404, True)


async def test_hostile_texts_are_shown_as_texts_on_every_page(serving: Serving) -> None:
    async with serving() as live:
        await live.store.append(record(1, EVIL, local=EVIL, remote=EVIL + "2", error=EVIL, tags={"a": EVIL}))
        await live.login("feedback", "operate")
        for path in PAGES[:-2] + PAGES[-1:]:
            shown = (await live.browser.get(path)).text
            assert "<script>alert" not in shown and "<img src=x" not in shown, path
            assert "&lt;script&gt;" in shown or path == "/dashboard", path


async def test_without_keys_everybody_may_look_and_a_form_still_needs_its_token(serving: Serving) -> None:
    async with serving(keyless=True) as live:
        await filled(live)
        assert (await live.browser.get("/dashboard")).status_code == 200
        path = "/dashboard/requests/r1"
        assert (await live.post(f"{path}/say", action="approved", token="")).status_code == 403
        assert (await live.post(f"{path}/say", action="approved", token=await live.token(path))).status_code == 303
        assert len(await live.store.corrections("sort")) == 1


async def test_many_who_look_at_once_read_the_store_once_and_see_the_same(serving: Serving) -> None:
    async with serving(keyless=True) as live:
        for number, text in enumerate(texts(20)):
            await live.store.append(record(number, text, remote=right(text)))
        shown: list[httpx2.Response] = await asyncio.gather(*(live.browser.get("/dashboard") for _ in range(8)))
        assert {answer.status_code for answer in shown} == {200}
        assert len({answer.text for answer in shown}) == 1
