"""Whatever is waited for ends at its deadline, and at no other one, though there is one timer for all."""

from __future__ import annotations

import asyncio

import pytest

from apprentice import deadlines

LONG = 3600.0


async def limited(left: float, until: asyncio.Event | None = None) -> str:
    """What became of waiting for an event, that may never come."""
    limit, watch = asyncio.timeout(None), deadlines.here()
    try:
        async with limit:
            watch.put(limit, left)
            await (until or asyncio.Event()).wait()
    except TimeoutError:
        return "late"
    finally:
        watch.drop(limit)
    return "in time"


async def test_each_ends_at_its_own_deadline_and_none_before_in_whatever_order_they_were_put() -> None:
    async def one(left: float) -> float:
        began = asyncio.get_running_loop().time()
        assert await limited(left) == "late"
        return asyncio.get_running_loop().time() - began

    some = (0.09, 0.03, 0.12, 0.06, 0.0)
    took = await asyncio.gather(*(one(left) for left in some))
    assert all(seconds >= left - 1e-6 for seconds, left in zip(took, some, strict=True))


async def test_what_is_over_in_time_is_not_touched_and_does_not_wait() -> None:
    done = asyncio.Event()
    waiting = asyncio.ensure_future(limited(LONG, done))
    assert await limited(0.01) == "late"
    assert not waiting.done()
    done.set()
    assert await waiting == "in time"


async def test_a_deadline_that_is_put_again_counts_from_then_on() -> None:
    watch, limit, other = deadlines.here(), asyncio.timeout(None), asyncio.timeout(None)
    async with limit:
        watch.put(limit, 0.01)
        watch.put(limit, LONG)
        with pytest.raises(TimeoutError):
            async with other:
                watch.put(other, 0.05)
                await asyncio.Event().wait()
    watch.drop(limit)
    watch.drop(other)
    assert (limit.expired(), other.expired()) == (False, True)


async def test_whoever_is_cancelled_is_not_told_that_it_was_late() -> None:
    waiting = asyncio.ensure_future(limited(LONG))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_each_event_loop_has_its_own() -> None:
    async def one() -> deadlines.Watch:
        assert deadlines.here() is deadlines.here()
        assert await limited(0.01) == "late"
        return deadlines.here()

    first, second = asyncio.Runner(), asyncio.Runner()
    with first, second:
        found = [runner.run(one()) for runner in (first, second, first)]
    assert found[0] is not found[1]
    assert found[1] is not found[2]
