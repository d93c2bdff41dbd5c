"""One call, `run(task, input)`: an expensive remote LLM teaches a small local model, and is withdrawn."""

from __future__ import annotations
