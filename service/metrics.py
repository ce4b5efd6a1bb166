"""What the worker counts, for Prometheus."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from longstride.errors import BadInput
from longstride.scheduler.answer import Answer, ReadReport

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry; `serve` opens a port for it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help_: str) -> Counter:
            return Counter(f"longstride_{name}", help_, registry=self.registry)

        def gauge(name: str, help_: str) -> Gauge:
            return Gauge(f"longstride_{name}", help_, registry=self.registry)

        self.read = counter("tokens_read", "Tokens of streams read")
        self.cached = counter("tokens_cached", "Context tokens of answers whose KV was reused")
        self.encoded = counter("tokens_encoded", "Tokens computed while reading and for questions")
        self.generated = counter("tokens_generated", "Tokens of answers")
        self.retrievals = counter("retrievals", "Searches")
        self.rewrites = counter("rewrites", "Segments replaced during answers")
        self.messages = Counter("longstride_messages", "Messages by outcome", ["outcome"], registry=self.registry)
        self.waiting = gauge("inbox_messages", "Messages that wait or are worked on")
        self.waiting_bytes = gauge("inbox_bytes", "Their bytes")
        self.oldest = gauge("inbox_age_seconds", "Seconds since the oldest message that waits was received")
        self.dead = gauge("dead_letters", "Messages that could not be done and were not dropped")
        self.outgoing = gauge("outbox_messages", "Replies that wait to be published")
        self.refused = gauge("replies_refused", "Replies that the broker does not take")
        self.connected = gauge("connected", "Whether the broker is connected")
        self.first_token = Histogram(
            "longstride_first_token_seconds", "From a question's turn to the first token of its answer",
            buckets=FIRST_TOKEN_S, registry=self.registry,
        )  # fmt: skip

    @contextmanager
    def serve(self, host: str, port: int) -> Iterator[int]:
        """The metrics at http://host:port/metrics; 0 takes a free port. Yields the port. Raises `BadInput`."""
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise BadInput(f"the metrics port {host}:{port} cannot be opened: {error.strerror}") from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def fed(self, report: ReadReport) -> None:
        """Text was read."""
        self.read.inc(report.tokens)
        self.encoded.inc(report.encoded)

    def answered(self, answer: Answer) -> None:
        """A question was answered, or a note written."""
        usage = answer.usage
        self.cached.inc(usage.cached)
        self.encoded.inc(usage.encoded + usage.rewritten)
        self.generated.inc(usage.generated)
        self.retrievals.inc(usage.retrievals)
        self.rewrites.inc(usage.rewrites)
        self.first_token.observe(answer.timing.first_token)
