"""A small task that a student learns in a second, and a remote for it on loopback."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from apprentice.config import Config, parse
from apprentice.testing.servers import asked
from apprentice.types import Json

SORTS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "melon"],
    "animal": ["horse", "otter", "badger", "heron", "weasel", "tiger"],
    "tool": ["hammer", "chisel", "wrench", "pliers", "spanner", "drill"],
}

YAML = """
tasks:
  - name: sort
    description: "Say what kind of thing is meant"
    input_schema: {text: str}
    output_schema: {kind: [fruit, animal, tool]}
    evaluator: exact_match
    confidence_thresholds:
      phase1_to_phase2: 40
      phase2_to_phase3: 0.80
      coaching_trigger: 0.50
      emergency_threshold: 0.25
remote:
  provider: openai
  model: gpt-4o-mini
  base_url: BASE_URL
  allow_internal: true
  permission: {basis: "answers made up for tests", by: "the tests", date: "1970-01-01", scope: "*"}
  max_tokens: 64
  timeout: 20
  retries: 1
local:
  backend: embedded
  fine_tune_batch_size: 60
  fine_tune_settings: {encoder: tfidf}
sampling:
  min_floor: 0.05
  repeat_share: 0
"""


def right(text: str) -> str:
    """The kind of thing that a text of `texts` speaks of."""
    return next(kind for kind, words in SORTS.items() if any(re.search(rf"\b{word}\b", text) for word in words))


def texts(n: int, seed: int = 0) -> list[str]:
    """Sentences, each about one thing; all different."""
    dice = Random(seed)
    things = [thing for words in SORTS.values() for thing in words]
    return [f"please look at the {dice.choice(things)} number {i}" for i in range(n)]


def honest(body: dict[str, Json]) -> Json:
    """A remote that knows the answer."""
    return {"kind": right(asked(body)["text"])}


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    """The configuration for a remote at an address, with the store and the models in the test's folder."""

    def make(base_url: str = "http://127.0.0.1:9", text: str = YAML, **sections: Any) -> Config:
        config = parse(text.replace("BASE_URL", base_url), tmp_path / "apprentice.yaml")
        for section, changes in sections.items():
            changed = getattr(config, section).model_copy(update=changes)
            config = config.model_copy(update={section: changed})
        return config

    return make
