"""The report as one page: everything is in it, nothing is fetched, and no customer's text becomes a tag."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from apprentice.cli import main
from apprentice.config import Config
from apprentice.dashboard import pages, views
from apprentice.types import Event, Json

from ..conftest import YAML, texts
from .conftest import EVIL, history, opened, record

Configured = Callable[..., Config]
_VOID = {"meta", "link", "input", "br", "img", "hr"}


class Outline(HTMLParser):
    """The tags of a page, and whether each one that is opened is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def page(config: Config) -> str:
    async with opened(config) as store:
        return pages.report(await views.read(config, store, now=2e9), now=2e9)


async def test_the_report_shows_the_history_without_asking_any_other_place(configured: Configured) -> None:
    config = configured()
    async with opened(config) as store:
        await history(config, store)
    text = await page(config)
    found = Outline(text)
    tags = [tag for tag, _ in found.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    links = [given[name] for _, given in found.tags for name in ("href", "src", "action") if given.get(name)]
    assert links and all(link is not None and link.startswith("#") for link in links)
    assert "url(" not in text and "@import" not in text
    assert tags.count("svg") == 4 and tags.count("h1") == 1
    assert "default-src 'none'" in text
    for word in ("v1", "v2", "contract", "input shift", "fruit", "80.0%", "promised"):
        assert word in text, word


async def test_an_alert_is_open_until_the_event_that_ends_it_and_what_nothing_ends_is_neither(
    configured: Configured,
) -> None:
    config = configured()
    models = {"gone": {"model": "a"}, "back": {"model": "b"}}
    said: list[tuple[str, dict[str, Json]]] = [
        ("TIGHTEN", {}),
        ("CONTRACT_BROKEN", models["gone"]),
        ("CONTRACT_BROKEN", models["back"]),
        ("CERTIFIED", {}),
        ("MODEL_RESUMED", models["back"]),
        ("TRAINING_FAILED", {}),
        ("ROWS_REFUSED", {}),
    ]
    async with opened(config) as store:
        for number, (name, evidence) in enumerate(said):
            event = Event(name=name, task="sort", at=1e9 + number, message=f"no. {number}", evidence=evidence)
            await store.add_event(event)
        shown = views.happenings(await views.read(config, store, now=2e9))
    assert [(event.message, state) for event, state in shown] == [
        ("no. 6", None),
        ("no. 5", "open"),
        ("no. 4", None),
        ("no. 3", None),
        ("no. 2", "over"),
        ("no. 1", "open"),
        ("no. 0", "over"),
    ]
    lines = re.findall(r"<li><time>.*?</li>", await page(config))
    marks = ["open" if ">open<" in line else "over" if ">(over)<" in line else None for line in lines]
    assert marks == [state for _, state in shown]


async def test_charts_have_a_name_and_their_numbers_in_a_table_and_tables_a_caption(configured: Configured) -> None:
    config = configured()
    async with opened(config) as store:
        await history(config, store)
    found = Outline(await page(config))
    for tag, given in found.tags:
        if tag in ("svg", "meter"):
            assert given["aria-label"]
        if tag == "th":
            assert given["scope"] in ("row", "col")
    tags = [tag for tag, _ in found.tags]
    assert tags.count("caption") == tags.count("table") >= 8
    ids = [given["id"] for _, given in found.tags if "id" in given]
    assert len(ids) == len(set(ids))


async def test_no_text_of_a_customer_or_an_operator_becomes_a_tag(configured: Configured) -> None:
    text = YAML.replace('"Say what kind of thing is meant"', "'" + EVIL.replace("'", "''") + "'")
    text = text.replace("kind: [fruit, animal, tool]", "kind: str")
    config = configured(text=text)
    async with opened(config) as store:
        for number, said in enumerate((EVIL, "fruit", EVIL, "<b>animal")):
            await store.append(record(number, EVIL, local=said, remote="</td>fruit", version=EVIL))
        await store.add_event(Event(name=EVIL, task="sort", at=1.0, message=EVIL))
    made = await page(config)
    assert not {"script", "img"} & {tag for tag, _ in Outline(made).tags}
    assert "<script" not in made and "<img" not in made and "<b>animal" not in made
    assert "&lt;script&gt;alert(&#39;x&#39;)" in made


async def test_a_store_without_a_request_makes_a_page(configured: Configured) -> None:
    text = await page(configured())
    Outline(text)
    assert "not known yet" in text and "There is no version yet" in text and "Nothing happened yet" in text


async def test_a_small_set_of_labels_is_a_table_of_both_and_a_large_one_a_list(configured: Configured) -> None:
    config = configured(text=YAML.replace("kind: [fruit, animal, tool]", "kind: str"))
    async with opened(config) as store:
        for number in range(20):
            await store.append(record(number, "x", local=f"kind {number % 2}", remote="kind 0"))
        [small] = await views.read(config, store, now=2e9)
        for number in range(20, 40):
            await store.append(record(number, "x", local=f"kind {number}", remote="kind 0"))
        [large] = await views.read(config, store, now=2e9)
    assert small.confusion is not None
    assert (small.confusion.labels, small.confusion.counts) == (["kind 0", "kind 1"], [[10, 0], [10, 0]])
    assert large.confusion is None
    assert (large.confused[0].local, large.confused[0].remote, large.confused[0].audits) == ("kind 1", "kind 0", 10)
    assert [(line.name, line.audits, line.agreement) for line in large.fields] == [("kind", 40, 0.25)]


async def test_stretches_cover_every_request_and_hold_the_agreement_in_their_bounds(configured: Configured) -> None:
    config = configured()
    async with opened(config) as store:
        for number, text in enumerate(texts(47)):
            await store.append(record(number, text, local="fruit" if number % 3 else "tool", remote="fruit"))
        [task] = await views.read(config, store, now=2e9)
    assert [one.first for one in task.stretches] == [1, *(one.last + 1 for one in task.stretches[:-1])]
    assert task.stretches[-1].last == 47
    assert sum(one.audits for one in task.stretches) == 47
    for one in task.stretches:
        assert one.lower is not None and one.agreement is not None and one.upper is not None
        assert one.lower <= one.agreement <= one.upper
    assert [one.last for one in task.stretches] == [point.last for point in task.report.trajectory]


async def test_what_waits_is_disagreements_first_then_deferrals_and_nothing_judged(configured: Configured) -> None:
    config = configured()
    deferred = record(0, "x").decision.model_copy(update={"reason": "deferred"})
    async with opened(config) as store:
        await store.append(record(1, "x", local="fruit", remote="fruit"))
        await store.append(record(2, "x", local="tool", remote="fruit"))
        await store.append(record(3, "x", local="fruit", remote="fruit", decision=deferred))
        await store.append(record(4, "x", local="tool", remote="fruit"))
        order, after = [], ""
        while (found := await views.queue(store, config.task("sort"), after=after)).now is not None:
            after = found.now.record.request_id
            order.append(after)
    assert (order, found.waiting, found.judged) == (["r4", "r2", "r3"], 3, 0)


def test_the_command_writes_the_page(configured: Configured, tmp_path: Path) -> None:
    asyncio.run(_once_answered(configured()))
    (tmp_path / "apprentice.yaml").write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    done = _run("from apprentice.cli import main", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    Outline((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_without_jinja2_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "apprentice.yaml").write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    done = _run("import sys; sys.modules['jinja2'] = None; from apprentice.cli import main", tmp_path)
    assert done.returncode == 2
    assert "pip install 'apprentice[gateway]'" in done.stderr


async def _once_answered(config: Config) -> None:
    async with opened(config) as store:
        await store.append(record(1, "x", remote="fruit"))


def _run(begin: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"{begin}\nimport sys\nsys.exit(main(['report', '--html', 'report.html']))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_a_place_that_cannot_be_written_is_an_error_with_a_hint(
    configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(_once_answered(configured()))
    (tmp_path / "apprentice.yaml").write_text(YAML.replace("BASE_URL", "http://127.0.0.1:9"))
    code = main(
        ["report", "--config", str(tmp_path / "apprentice.yaml"), "--html", str(tmp_path / "nowhere" / "report.html")]
    )
    assert code == 2
    assert re.search(r"cannot write .*nowhere", capsys.readouterr().err)
