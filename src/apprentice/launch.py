"""Starts a teaching cycle in a process of its own, and waits for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

from apprentice.config import Config


async def teach(config: Config, task: str) -> tuple[int, str]:
    """One teaching cycle in a process of its own: its exit code and what it said.

    The process is in a session of its own and outlives this one, so that a short-lived caller teaches, too.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[int, str]] = loop.create_future()

    def attend() -> None:
        try:
            outcome = _run(config, task)
        except OSError as error:
            outcome = 127, f"the worker could not be started: {error}"
        # The loop may be gone by now: then nobody waits for the outcome either.
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(outcome))

    # A daemon thread, because the interpreter joins the threads of an executor when it exits.
    threading.Thread(target=attend, name=f"learn-{task}", daemon=True).start()
    return await ended


def _run(config: Config, task: str) -> tuple[int, str]:
    """Run the worker to its end. It gets the configuration on its standard input, and none of the providers' keys but
    those of the teachers that it is to ask."""
    local = config.task(task).local or config.local
    log = local.model_dir / task / "learn.log"
    keys = {remote.api_key_env for remote in [config.remote, *config.remote.additional_providers, *config.teachers]}
    if local.teacher_labels:
        keys -= {remote.api_key_env for remote in config.teachers}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, and the name of a configured task
            [sys.executable, "-m", "apprentice.worker", "--once", task],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name not in keys},
            start_new_session=True,
        )
    process.communicate(config.model_dump_json().encode())
    return process.returncode, log.read_text(errors="replace")
