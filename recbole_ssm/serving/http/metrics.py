"""What is counted for Prometheus."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from recbole_ssm.serving.http.store import MemoryStore

# Where several processes serve, each writes its counts into files in this folder, and any of them reads all.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counts of one server.

    Attributes:
        requests: by method, route and status.
        seconds: of requests, by route.
        events: that sessions took in.
        conflicts: sessions that another process changed at the same time, and that were tried again.
        store_errors: batches that the store of sessions did not answer.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "recbole_ssm_requests", "Requests answered", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "recbole_ssm_request_seconds", "Time of a request", ["route"], registry=registry, buckets=SECONDS
        )
        self.events = Counter("recbole_ssm_events", "Events that sessions took in", registry=registry)
        self.conflicts = Counter(
            "recbole_ssm_store_conflicts", "Sessions that another process changed at the same time", registry=registry
        )
        self.store_errors = Counter(
            "recbole_ssm_store_errors", "Batches that the store of sessions did not answer", registry=registry
        )
        self._sizes = Histogram(
            "recbole_ssm_batch_requests", "Requests of a batch", ["kind"], registry=registry,
            buckets=[2**i for i in range(11)],
        )  # fmt: skip
        self._batches = Histogram(
            "recbole_ssm_batch_seconds", "Time of a batch", ["kind"], registry=registry, buckets=SECONDS
        )

    def watch(self, store: MemoryStore) -> None:
        """Count the sessions of a store in memory, too."""
        self._registry.register(_InMemory(store))

    @contextmanager
    def batch(self, kind: str, size: int) -> Iterator[None]:
        """Around a batch of requests."""
        self._sizes.labels(kind).observe(size)
        with self._batches.labels(kind).time():
            yield

    def text(self) -> bytes:
        """All counts, of all processes, in Prometheus' text format."""
        if FOLDER not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)
        return generate_latest(together)


class _InMemory(Collector):
    def __init__(self, store: MemoryStore):
        self._store = store

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("recbole_ssm_sessions", "Sessions in memory", len(self._store))
        yield GaugeMetricFamily("recbole_ssm_session_bytes", "Memory of their states", self._store.nbytes)
        yield CounterMetricFamily("recbole_ssm_evicted_sessions", "Sessions that had to go", self._store.evicted)
