"""For people who write plugins or test against Apprentice: contract suites, loopback servers and scripted models."""

from __future__ import annotations
