"""PURE: when a provider may be asked again. Time comes in as an argument.

- Breaker: after some failures in a row nobody is sent there for a while; then one call probes whether it is back.
- Pace: what the provider said about its limits (Retry-After, rate-limit headers) is obeyed before the next call leaves.
- Retries have a budget: a share of the calls, so that a sick provider is not asked several times as often as a healthy
  one (https://sre.google/sre-book/handling-overload/: a per-client retry budget).
- Money: a provider that says that its account is empty is left alone for a while.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from apprentice.types import Seconds

FAILURES = 5  # in a row; then the breaker opens
COOL: Seconds = 10.0  # the first time it stays open; doubled while the probes fail
LONGEST: Seconds = 300.0
NO_MONEY: Seconds = 900.0  # an account is not filled up sooner
RETRIES = 0.2  # of a call: what each first attempt adds to the budget of retries
SAVED = 10.0  # retries that may be saved up in quiet times


@dataclass(slots=True)
class Throttle:
    """One provider as this process sees it. `wait` asks, the other methods tell."""

    failures: int = 0
    opened: int = 0  # how often in a row the breaker has opened
    closed_until: Seconds = -math.inf  # the breaker is open before that moment
    probing: bool = False
    not_before: Seconds = -math.inf
    suspended: bool = False
    retries: float = SAVED / 2

    def wait(self, now: Seconds) -> Seconds:
        """Seconds until a call may leave: 0 for at once, infinite while nobody knows when (suspended, or being probed)."""
        if self.suspended or (self.opened and self.probing):
            return math.inf
        return max(0.0, self.closed_until - now, self.not_before - now)

    def leaves(self, now: Seconds, *, retry: bool) -> None:
        """A call leaves. The first one after the breaker was open is its probe."""
        self.probing = self.opened > 0 and now >= self.closed_until
        if not retry:
            self.retries = min(self.retries + RETRIES, SAVED)

    def may_retry(self) -> bool:
        """Take one retry out of the budget, if there is one."""
        if self.retries < 1:
            return False
        self.retries -= 1
        return True

    def answered(self, now: Seconds, pause: Seconds = 0.0) -> None:
        """The provider works; `pause`: how long its rate-limit headers ask for."""
        self.failures = self.opened = 0
        self.probing = False
        self.not_before = max(self.not_before, now + pause)

    def failed(self, now: Seconds, pause: Seconds | None = None, *, no_money: bool = False) -> None:
        """A call failed in a way that says something about the provider: overload, no connection, no answer."""
        self.probing = False
        self.failures += 1
        if pause is not None:
            self.not_before = max(self.not_before, now + pause)
        if no_money:
            self.not_before = max(self.not_before, now + NO_MONEY)
        elif self.opened or self.failures >= FAILURES:
            self.closed_until = now + min(COOL * 2**self.opened, LONGEST)
            self.opened += 1
            self.failures = 0

    def gave_up(self) -> None:
        """A call ended without saying anything about the provider: its caller went away, or it was never sent."""
        self.probing = False
