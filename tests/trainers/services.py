"""Trainers at the simulated services, in a hurry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from apprentice import plugins
from apprentice.testing import hostile
from apprentice.testing.finetuning import Service, serve_fireworks_tuning, serve_openai_tuning
from apprentice.trainers._remote import Remote

QUICK: dict[str, Any] = {"poll": 0.01, "patience": 1.0, "allow_internal": True, "price_per_million": 3, "timeout": 5.0}
OWN: dict[str, dict[str, Any]] = {
    "openai": {"model": "gpt-4.1-mini-2025-04-14", "hidden": 0.05},
    "fireworks": {"model": "accounts/fireworks/models/qwen3-8b", "account": "my-team"},
}


def trainer(name: str, service: Service, **changes: Any) -> Remote:
    made: Remote = plugins.build(
        "trainers", name, **{"base_url": service.url, "api_key_env": None, **QUICK, **OWN[name], **changes}
    )
    return made


@contextmanager
def serving(name: str, **scripted: Any) -> Iterator[Service]:
    """The service of that name, with a small true adapter; nothing that it was asked went beyond what it knows."""
    if name == "fireworks" and "adapter" not in scripted:
        scripted["adapter"] = adapter()
    serve = serve_openai_tuning if name == "openai" else serve_fireworks_tuning
    with serve(**scripted) as service:
        yield service
    assert service.faults == []


def adapter() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in hostile.adapter(Path(folder)).iterdir()}
