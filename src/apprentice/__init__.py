"""One call, `run(task, input)`: an expensive remote LLM teaches a small local model, and is withdrawn."""

from __future__ import annotations

from apprentice.config import Config, load
from apprentice.engine import Apprentice
from apprentice.types import Answer, Confidence, Decision, Record, Result, Score

__all__ = ["Answer", "Apprentice", "Confidence", "Config", "Decision", "Record", "Result", "Score", "load"]
__version__ = "0.1.0"
