"""What Prometheus sees of the server: requests by path and status, seconds, tokens, and what runs."""

import dataclasses
from collections.abc import Awaitable, Callable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rest_jax.serving.engine import Engine
from rest_jax.serving.protocol import ApiError

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GONE = 499  # the status, in logs, of a request whose client has left


class Meters:
    """The counters of one server. A resource: they are its own, so that a process may have several."""

    def __init__(self, engine: Engine):
        registry = self._registry = CollectorRegistry()

        self.requests = Counter(
            "rest_jax_requests", "that were answered", ("path", "status"), registry=registry
        )
        self.first_token = Histogram(
            "rest_jax_first_token_seconds",
            "to the first token",
            registry=registry,
            buckets=_SECONDS,
        )
        self.seconds = Histogram(
            "rest_jax_request_seconds", "of an answer", registry=registry, buckets=_SECONDS
        )
        active = Gauge("rest_jax_active", "completions that run or wait", registry=registry)
        active.set_function(lambda: engine.active)
        registry.register(_Counts(engine))

    def page(self) -> tuple[bytes, int, None, str]:
        """Body, status, headers and type of the answer to Prometheus."""
        return generate_latest(self._registry), 200, None, CONTENT_TYPE_LATEST

    def timed(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler, which counts its answers."""

        async def counted(request: Request) -> Response:
            status = 500
            try:
                response = await handler(request)
                status = response.status_code
                return response
            except ApiError as error:
                status = error.status
                raise
            except ClientDisconnect:
                status = _GONE
                return Response(status_code=_GONE)
            finally:
                self.requests.labels(request.url.path, str(status)).inc()

        return counted


class _Counts(Collector):
    """What the stream counts, under the names that it has there."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One counter each."""
        stats = self._engine.stream.stats
        counts = {**dataclasses.asdict(stats), "prompt_tokens": stats.prompt_tokens}
        for name, value in counts.items():
            yield CounterMetricFamily(f"rest_jax_{name}", "of the stream", value=value)
