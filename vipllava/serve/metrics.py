"""What Prometheus reads: a registry of its own for each server, so that two do not mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vipllava.serve.admission import Admission

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300)


class Metrics:
    """Counts and times of one server.

    Args:
        admissions: of each model, by name; read when somebody asks.
    """

    def __init__(self, admissions: Callable[[], Iterable[tuple[str, Admission]]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vipllava_requests", "Requests that were answered, refusals included.",
            ["model", "route", "status"], registry=self.registry,
        )  # fmt: skip
        self.rejected = Counter(
            "vipllava_rejected", "Requests that were refused, by the error's code.",
            ["model", "reason"], registry=self.registry,
        )  # fmt: skip
        self.latency = Histogram(
            "vipllava_request_seconds", "From a chat's first byte to the end of its answer.",
            ["model"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "vipllava_first_token_seconds", "From a chat's first byte to its answer's first text.",
            ["model"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "vipllava_prompt_tokens", "Tokens of prompts, images included.",
            ["model"], registry=self.registry,
        )  # fmt: skip
        self.completion_tokens = Counter(
            "vipllava_completion_tokens", "Tokens of answers.", ["model"], registry=self.registry
        )
        self.registry.register(_Queues(admissions))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)


class _Queues(Collector):
    def __init__(self, admissions: Callable[[], Iterable[tuple[str, Admission]]]) -> None:
        self._admissions = admissions

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily(
            "vipllava_running", "Requests that the engine has.", labels=["model"]
        )
        waiting = GaugeMetricFamily(
            "vipllava_waiting", "Requests that wait for it.", labels=["model"]
        )
        for name, admission in self._admissions():
            running.add_metric([name], admission.running)
            waiting.add_metric([name], admission.waiting)
        return running, waiting
