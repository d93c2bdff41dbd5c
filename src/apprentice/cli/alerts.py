"""The command that shows who is told of events, and tries it."""

from __future__ import annotations

import argparse
import time
from random import Random

from apprentice import worker
from apprentice.alerts import Courier, Standing
from apprentice.cli.terminal import Command, print_json, when, with_store
from apprentice.config import Config
from apprentice.errors import ConfigError
from apprentice.report import report
from apprentice.types import Store


def _alerts(parsed: argparse.Namespace) -> int:
    """Show who is told of events and what is in the way; send a test notice, or what is due now."""

    async def tried(config: Config, store: Store) -> dict[str, str | None]:
        return await _courier(config, store).tell("TEST", "", "this is a test: alerts of Apprentice arrive here", {})

    async def seen(config: Config, store: Store) -> list[Standing]:
        courier = _courier(config, store)
        if parsed.send:
            await courier.deliver()
        return await courier.look()

    if parsed.test:
        told = with_store(parsed, tried)
        if parsed.json:
            print_json([{"sink": sink, "problem": problem} for sink, problem in told.items()])
        else:
            print("\n".join(f"{sink}: {problem or 'took the test notice'}" for sink, problem in told.items()))
        return int(any(told.values()))
    found = with_store(parsed, seen)
    if parsed.json:
        print_json([standing.model_dump(mode="json", exclude={"place": {"told"}}) for standing in found])
    else:
        print("\n".join(map(_text, found)))
    return int(any(standing.place.problem for standing in found)) if parsed.send else 0


def tell_reports(parsed: argparse.Namespace) -> int:
    """Send the sums of each task's report to the configured webhooks, once."""

    async def told(config: Config, store: Store) -> list[tuple[str, str, str | None]]:
        if not config.alerts.webhooks:
            raise ConfigError("there is no webhook to report to", hint="list one in `alerts: {webhooks: […]}`")
        courier, found = _courier(config, store), []
        for task in await report(config, store):
            sums = task.model_dump(mode="json", include=_SUMS)
            message = (
                f"{task.requests:,} requests, {task.remote_share:.1%} asked the remote; "
                f"cost ${task.cost / 1e6:.2f}, saved ${task.saved / 1e6:.2f}"
            )
            answers = await courier.tell("REPORT", task.task, message, sums, kind="webhook")
            found += [(task.task, sink, problem) for sink, problem in answers.items()]
        return found

    lines = with_store(parsed, told)
    if parsed.json:
        print_json([{"task": task, "sink": sink, "problem": problem} for task, sink, problem in lines])
    else:
        print("\n".join(f"{task}: {sink}: {problem or 'took the report'}" for task, sink, problem in lines))
    return int(any(problem for _, _, problem in lines))


_SUMS = {
    "requests",
    "failed",
    "remote_calls",
    "remote_share",
    "served_locally",
    "cost",
    "local_cost",
    "all_remote_cost",
    "saved",
    "agreement",
}


def _courier(config: Config, store: Store) -> Courier:
    if not config.alerts.sinks:
        raise ConfigError("nobody is told of events", hint="list webhooks, files or commands in `alerts:`")
    dice = Random()  # noqa: S311 - it spreads the moments of retries
    return Courier(config, store, clock=time.time, owner=worker.owner(), dice=dice)


def _text(standing: Standing) -> str:
    place = standing.place
    last = "nothing yet" if place.delivered_at is None else f"{place.delivered:,}, the last {when(place.delivered_at)}"
    text = f"{standing.sink}: told {last}; {standing.waiting:,} waiting"
    if place.dropped:
        text += f"; {place.dropped:,} given up"
    if place.problem is not None and place.since is not None:
        text += f"\n  {place.problem} ({place.failed:,} tries since {when(place.since)}; next {when(place.retry_at)})"
    return text


COMMANDS = (
    Command(
        "alerts",
        _alerts,
        "apprentice alerts --test",
        (
            ("--test", {"action": "store_true", "help": "send a test notice to every sink"}),
            ("--send", {"action": "store_true", "help": "deliver what is due, as `apprentice worker` does (for cron)"}),
        ),
    ),
)
