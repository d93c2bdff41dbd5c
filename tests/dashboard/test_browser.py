"""A person at a browser: real Chromium, the demo's data, keyboard alone, phone and desktop, light and dark."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright

from apprentice import demo
from apprentice.config import Config
from apprentice.dashboard import pages, views
from apprentice.gateway import keys
from apprentice.gateway.keys import ROLES

from .conftest import opened, running

LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (360, 1280)]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The demo's store after 420 requests: a champion, audits, deferrals."""
    rows, folder = demo.recording("banking77", None)[:420], tmp_path_factory.mktemp("demo")
    return asyncio.run(demo.play("banking77", rows, seed=0, folder=folder))


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The system's own browser."""
    found = shutil.which("chromium")
    assert found is not None, "apt-get install chromium"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()


class Watched:
    """A page whose errors and requests are written down."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    async def check(self) -> None:
        """It fits its width, and axe finds nothing."""
        wide, inner = await self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner, f"{self.page.url} is {wide} wide in {inner}"
        found = await Axe().run(self.page)
        assert found.violations_count == 0, f"{self.page.url}\n{found.generate_report()}"


async def focused(page: Page) -> str:
    text: str = await page.evaluate("(document.activeElement.innerText || document.activeElement.id || '').trim()")
    return text


async def press(page: Page, key: str) -> None:
    """Press a key that leads to another page, and wait for that."""
    async with page.expect_navigation():
        await page.keyboard.press(key)


async def tab_to(page: Page, wanted: str) -> None:
    """Press Tab until the element with this text or id has the focus."""
    seen = []
    for _ in range(80):
        await page.keyboard.press("Tab")
        seen.append(await focused(page))
        if seen[-1].startswith(wanted):
            return
    raise AssertionError(f"{wanted!r} cannot be reached: {seen}")


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), LOOKS)
async def test_every_page_fits_is_accessible_and_asks_no_other_place(played: Config, scheme: str, width: int) -> None:
    async with running(played, keyless=True) as url, chromium() as browser, opened(played) as store:
        page = await browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme="dark" if scheme == "dark" else "light"
        )
        watched = Watched(page)
        [(_, last)] = await store.records("banking77", limit=1, newest=True)
        task = "/dashboard/tasks/banking77"
        for path in (
            "/dashboard",
            task,
            f"{task}/review",
            f"{task}/versions",
            f"{task}/versions/v1/promote",
            f"/dashboard/requests/{last.request_id}",
            "/dashboard/login",
            "/dashboard/tasks/nobody",
        ):
            await page.goto(f"{url}{path}")
            await watched.check()
    assert [error for error in watched.errors if "404" not in error] == []
    assert watched.asked and all(asked.startswith((url, "data:")) for asked in watched.asked)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), LOOKS)
async def test_the_report_is_a_page_of_its_own(played: Config, tmp_path: Path, scheme: str, width: int) -> None:
    async with opened(played) as store:
        now = time.time()
        (tmp_path / "report.html").write_text(
            pages.report(await views.read(played, store, now=now), now=now), encoding="utf-8"
        )
    async with chromium() as browser:
        page = await browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme="dark" if scheme == "dark" else "light"
        )
        watched = Watched(page)
        await page.goto((tmp_path / "report.html").as_uri())
        for one in await page.locator("summary").all():
            await one.click()
        await watched.check()
    assert (watched.errors, len(watched.asked)) == ([], 1)


@pytest.mark.slow
async def test_a_person_logs_in_judges_and_corrects_with_the_keyboard_alone(played: Config) -> None:
    async with running(played) as url, chromium() as browser, opened(played) as store:
        made = await keys.create(store, f"person {time.time()}", frozenset(ROLES), at=time.time())
        page = await browser.new_page()
        watched = Watched(page)
        await page.goto(f"{url}/dashboard")
        await tab_to(page, "key")
        await page.keyboard.type(made.secret)
        await press(page, "Enter")
        assert page.url == f"{url}/dashboard"
        for link in ("banking77", "Review"):
            await tab_to(page, link)
            await press(page, "Enter")
        first = await page.locator("main a").first.inner_text()
        for key in ("1", "2"):
            await press(page, key)
        assert await page.locator("main a").first.inner_text() != first
        for key in ("s", "e"):
            await press(page, key)
        await page.locator("#target").focus()
        await page.keyboard.press("Control+A")
        await page.keyboard.type('{"intent": "card_arrival"} 12s')  # the keys of the queue are letters here
        await page.keyboard.press("Control+A")
        await page.keyboard.type('{"intent": "card_arrival"}')
        await tab_to(page, "Save as right")
        await press(page, "Enter")
        words = await store.corrections("banking77")
        assert len(words) == 3
        assert (words[-1].action, words[-1].target) == ("corrected", {"intent": "card_arrival"})
        assert {one.by for one in words} == {f"key:{made.key.name}"}
        await tab_to(page, "Versions")
        await press(page, "Enter")
        assert await page.get_by_role("table", name="Compared").count() == 1
        await tab_to(page, "Log out")
        await press(page, "Enter")
        await page.goto(f"{url}/dashboard")
        assert page.url.endswith("/login")
    assert watched.errors == []
