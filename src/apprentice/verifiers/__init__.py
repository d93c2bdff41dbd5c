"""Verifiers: an answer alone -> Verdict."""

from __future__ import annotations
