"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counts of one server. A text is one choice: a request with two prompts and n = 2 makes four.

    Args:
        experts: names, in the order of the weights.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests by path and status", ["path", "status"])
        self._texts = self._counter("texts", "Texts by how they ended: stop, length, cancelled, refused, failed", ["reason"])
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts taken in")
        self._tokens = self._counter("generated_tokens", "Tokens written")
        weights = self._counter("expert_weight", "Sum of an expert's mixture weight over the tokens written", ["expert"])
        self._weights = [weights.labels(name) for name in experts]
        mean = Gauge(
            "megaxelm_expert_mean_weight", "Mixture weight of an expert, mean over all tokens written", ["expert"], registry=self._registry
        )
        self._sums = [0.0] * len(experts)
        self._written = 0
        for index, name in enumerate(experts):
            mean.labels(name).set_function(lambda index=index: self._sums[index] / max(self._written, 1))  # type: ignore[misc]
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token", _FIRST_TOKEN_SECONDS)
        self._next = self._histogram("time_per_token_seconds", "From a token of a text to the next", _TOKEN_SECONDS)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(f"megaxelm_{name}", help_text, registry=self._registry).set_function(value)

    def request_answered(self, path: str, status: int) -> None:
        """An HTTP request was answered."""
        self._requests.labels(path, str(status)).inc()

    def text_started(self, prompt_tokens: int) -> None:
        """The engine took a text in."""
        self._prompt_tokens.inc(prompt_tokens)

    def first_token(self, seconds: float, weights: Sequence[float]) -> None:
        """`seconds` after the request."""
        self._first.observe(seconds)
        self._count(weights)

    def next_token(self, seconds: float, weights: Sequence[float]) -> None:
        """`seconds` after the token before."""
        self._next.observe(seconds)
        self._count(weights)

    def text_ended(self, reason: str) -> None:
        """A text was finished or given up."""
        self._texts.labels(reason).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _count(self, weights: Sequence[float]) -> None:
        self._tokens.inc()
        self._written += 1
        for index, weight in enumerate(weights):
            self._sums[index] += weight
            self._weights[index].inc(weight)

    def _counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"megaxelm_{name}", help_text, labels, registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"megaxelm_{name}", help_text, registry=self._registry, buckets=buckets)
