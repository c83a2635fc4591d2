"""A server's figures for Prometheus. Labels are of bounded sets; no prompt is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pixart_jax.serving.engine import Engine
from pixart_jax.serving.offer import Generation

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_FILL = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)


class Metrics:
    """The figures of one engine."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        kept: Any = {"registry": self.registry}
        gauges = {
            "num_requests_running": ("requests in the batch that runs", lambda: engine.running),
            "num_images_waiting": ("images in the queue", lambda: engine.waiting),
            "compiled_programs": ("programs that are compiled", lambda: engine.programs),
            "ready": ("1 where images are made", lambda: engine.state == "ready"),
        }
        for name, (what, value) in gauges.items():
            Gauge(f"pixart_{name}", what, **kept).set_function(value)
        self._requests = Counter("pixart_requests", "answers", ("route", "status"), **kept)
        self._images = Counter("pixart_images", "images made", **kept)
        self._rejected = Counter("pixart_rejected", "refused requests", ("reason",), **kept)
        self._cancelled = Counter("pixart_cancelled", "requests whose client went away", **kept)
        self._compile = Counter("pixart_compile_seconds", "of batches that compile", **kept)
        self._busy = Counter("pixart_busy_seconds", "of batches", **kept)

        def histogram(name: str, what: str, labels: tuple[str, ...] = (), buckets=_SECONDS):
            return Histogram(f"pixart_{name}", what, labels, buckets=buckets, **kept)

        self._queue = histogram("request_queue_time_seconds", "from arrival to the first batch")
        self._latency = histogram("e2e_request_latency_seconds", "of requests for images")
        self._batch = histogram("batch_time_seconds", "of batches", ("size", "steps"))
        self._fill = histogram("batch_fill_ratio", "images of a batch's places", buckets=_FILL)
        self._size, engine.on_batch = engine.limits.batch_size, self.batch_done

    def batch_done(
        self, generation: Generation, images: int, seconds: float, compiled: bool
    ) -> None:
        self._busy.inc(seconds)
        self._compile.inc(seconds * compiled)
        self._images.inc(images)
        self._fill.observe(images / self._size)
        size = f"{generation.width}x{generation.height}"
        self._batch.labels(size, str(generation.steps)).observe(seconds)

    def answered(self, route: str, facts: Mapping[str, Any]) -> None:
        """Count an answer, from its facts in the access log."""
        self._requests.labels(route, str(facts["status"])).inc()
        if facts["status"] in (429, 503) and route.startswith("/v1/images"):
            self._rejected.labels("busy" if facts["status"] == 429 else "unavailable").inc()
        if facts["status"] == 499:
            self._cancelled.inc()
        if "n" in facts:
            self._latency.observe(facts["seconds"])
            self._queue.observe(facts.get("queue_s", 0))

    def text(self) -> bytes:
        return generate_latest(self.registry)
