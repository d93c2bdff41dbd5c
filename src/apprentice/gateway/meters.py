"""What one process counts for Prometheus, and what the store says in the same form.

`apprentice_http_*` are one process's own: they carry the label `worker`. All others are the same from every process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from apprentice.report import TaskStatus
from apprentice.types import Confidence, Phase, Seconds

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meters:
    """What one process counts. `operation` is a path as it is documented, so that there are not more series than paths."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        worker = str(os.getpid())
        labels = ("method", "operation", "status", "worker")
        requests = Counter("apprentice_http_requests", "Requests by outcome", labels, registry=self.registry)
        seconds = Histogram(
            "apprentice_http_request_seconds",
            "Time until the answer was sent",
            ("operation", "worker"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        flight = Gauge("apprentice_http_in_flight", "Requests in flight", ("worker",), registry=self.registry)
        self.in_flight = flight.labels(worker)
        self._requests, self._seconds, self._worker = requests, seconds, worker
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}  # what the labels stand for

    def count(self, method: str, operation: str, status: int, seconds: Seconds) -> None:
        """One request that was answered."""
        known = method if method in _METHODS else "OTHER"
        series = self._series.get((known, operation, status))
        if series is None:
            counted = self._requests.labels(known, operation, str(status), self._worker)
            series = counted, self._seconds.labels(operation, self._worker)
            self._series[known, operation, status] = series
        series[0].inc()
        series[1].observe(seconds)

    def text(self, tasks: list[TaskStatus]) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry) + generate_latest(_Known(tasks))


_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


class _Known:
    """What the store says, as a registry that is asked once."""

    def __init__(self, tasks: list[TaskStatus]) -> None:
        self._tasks = tasks

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("apprentice_requests", "Requests recorded", labels=["task"])
        labels = CounterMetricFamily("apprentice_labels", "Requests with a remote answer", labels=["task"])
        phase = GaugeMetricFamily("apprentice_phase", "1 for the phase that a task is in", labels=["task", "phase"])
        drift = GaugeMetricFamily("apprentice_drift", "1 for the state of the detectors", labels=["task", "state"])
        forced = GaugeMetricFamily("apprentice_remote_forced", "1 while an operator wants the remote", labels=["task"])
        version = GaugeMetricFamily("apprentice_champion", "1 for the version that serves", labels=["task", "version"])
        canary = GaugeMetricFamily(
            "apprentice_canary_share", "Of what is served alone, while one is tried out", labels=["task", "version"]
        )
        spent = GaugeMetricFamily("apprentice_spent_usd", "Spent or held in a window", labels=["task", "window"])
        limit = GaugeMetricFamily("apprentice_cap_usd", "The cap of a window", labels=["task", "window"])
        numbers = {
            name: GaugeMetricFamily(f"apprentice_{name}", told, labels=["task"]) for name, told in _NUMBERS.items()
        }
        for task in self._tasks:
            requests.add_metric([task.task], task.requests)
            labels.add_metric([task.task], task.labels)
            for name in get_args(Phase):
                phase.add_metric([task.task, name], float(name == task.confidence.phase))
            for state in _DRIFTS:
                drift.add_metric([task.task, state], float(state == task.confidence.drift))
            forced.add_metric([task.task], float(task.mode is not None))
            if task.version is not None:
                version.add_metric([task.task, task.version.id], 1.0)
            if task.confidence.canary is not None:
                canary.add_metric([task.task, task.confidence.canary], task.confidence.canary_share)
            for window in task.spend:
                # Without its date, a day's window is the same series tomorrow.
                own, _, kind = window.window.rpartition("/")
                place = [task.task, ("task_" if own else "") + kind.partition(":")[0]]
                spent.add_metric(place, window.spent / 1e6)
                if window.limit is not None:
                    limit.add_metric(place, window.limit / 1e6)
            for name, family in numbers.items():
                if (value := getattr(task.confidence, name)) is not None:
                    family.add_metric([task.task], float(value))
        return [requests, labels, phase, drift, forced, version, canary, spent, limit, *numbers.values()]


_DRIFTS: tuple[str, ...] = get_args(Confidence.model_fields["drift"].annotation)
_NUMBERS = {
    "agreement": "Of the local model with the remote, on audits; it is not accuracy",
    "lower": "Lower bound of the agreement, valid at every moment",
    "upper": "Upper bound of the agreement, valid at every moment",
    "sampling_rate": "Probability that the next request is audited",
    "level": "Share of the least confident requests that go to the remote",
    "audits": "Audits of the version that serves",
    "certified": "1 if the promised agreement is proven",
    "verified": "0 if there were too few audits of late to say anything",
    "served_agreement": "Estimated agreement of what was served locally",
    "ceiling": "Agreement of the remote with itself, on requests that it was asked twice",
}
