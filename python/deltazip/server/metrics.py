"""What Prometheus sees: a registry of our own, a bounded number of series per variant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deltazip import _C

__all__ = ["Metrics", "VariantTimes"]

OTHER = "_other"  # no variant can have this name
_STATES = ("resident", "loading", "host", "disk", "draining")
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# name, what it says, attribute of VariantInfo
_VARIANT_COUNTERS = (
    ("requests", "Requests of a variant.", "num_requests"),
    ("prompt_tokens", "Prompt tokens of a variant.", "num_prompt_tokens"),
    ("output_tokens", "Output tokens of a variant.", "num_output_tokens"),
    ("loads", "Loads of a variant's delta to the device.", "num_loads"),
    ("evictions", "Evictions of a variant's delta from the device.", "num_evictions"),
)
_VARIANT_GAUGES = (
    ("file_bytes", "Size of a variant's file.", "file_bytes"),
    ("device_bytes", "Memory a variant takes on the device.", "device_bytes"),
    ("requests_running", "Sequences of a variant that run.", "num_running"),
    ("requests_waiting", "Sequences of a variant that wait.", "num_waiting"),
    ("load_seconds", "Duration of the variant's last load.", "load_seconds"),
)
_ENGINE_COUNTERS = (
    ("steps", "Steps of the engine.", "num_steps"),
    ("prompt_tokens", "Prompt tokens of all variants.", "num_prompt_tokens"),
    ("output_tokens", "Output tokens of all variants.", "num_output_tokens"),
    ("requests", "Requests of all variants.", "num_requests"),
    ("finished", "Requests that ended by stop or length.", "num_finished"),
    ("cancelled", "Requests that were cancelled.", "num_cancelled"),
    ("errors", "Requests that ended with an error.", "num_errors"),
    ("preemptions", "Sequences that gave their blocks back.", "num_preemptions"),
    ("prefix_hit_tokens", "Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    ("prefix_query_tokens", "Prompt tokens looked up there.", "prefix_query_tokens"),
)
_ENGINE_GAUGES = (
    ("running", "Sequences that run.", "num_running"),
    ("waiting", "Sequences that wait.", "num_waiting"),
    ("kv_blocks", "KV blocks in all.", "num_blocks"),
    ("kv_free_blocks", "KV blocks that no sequence owns.", "num_free_blocks"),
    ("seconds_since_progress", "Since the last step, with work to do.", "seconds_since_progress"),
    ("last_step_seconds", "Duration of the last step.", "last_step_seconds"),
    ("alive", "1 while the engine's loop runs.", "is_alive"),
)


class _EngineCollector(Collector):
    """Reads the engine when it is scraped; costs nothing in between."""

    def __init__(self, core: _C.Engine, metrics: Metrics) -> None:
        self._core = core
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        stats = self._core.stats()
        for name, text, attribute in _ENGINE_COUNTERS:
            yield CounterMetricFamily(
                f"deltazip_engine_{name}", text, value=float(getattr(stats, attribute))
            )
        for name, text, attribute in _ENGINE_GAUGES:
            yield GaugeMetricFamily(
                f"deltazip_engine_{name}", text, value=float(getattr(stats, attribute))
            )
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield GaugeMetricFamily(
            "deltazip_engine_kv_usage", "Share of KV blocks in use.", value=used
        )
        yield from self._variants()

    def _variants(self) -> Iterator[Metric]:
        infos = self._core.variants()
        self._metrics.keep_only({info.name for info in infos[1:]})
        by_label: dict[str, list[_C.VariantInfo]] = {}
        for position, info in enumerate(infos):
            label = self._metrics.label("" if position == 0 else info.name)
            by_label.setdefault(label, []).append(info)
        for name, text, attribute in _VARIANT_COUNTERS:
            counter = CounterMetricFamily(f"deltazip_variant_{name}", text, labels=["variant"])
            for label, infos in by_label.items():
                counter.add_metric([label], float(sum(getattr(i, attribute) for i in infos)))
            yield counter
        for name, text, attribute in _VARIANT_GAUGES:
            gauge = GaugeMetricFamily(f"deltazip_variant_{name}", text, labels=["variant"])
            for label, infos in by_label.items():
                gauge.add_metric([label], float(sum(getattr(i, attribute) for i in infos)))
            yield gauge
        state = GaugeMetricFamily(
            "deltazip_variant_state", "Variants in each state.", labels=["variant", "state"]
        )
        for label, infos in by_label.items():
            for name in _STATES:
                count = sum(info.state == name for info in infos)
                if count or name == "resident":
                    state.add_metric([label, name], float(count))
        yield state


class VariantTimes:
    """The latency histograms of one variant, looked up once per request."""

    __slots__ = ("_between", "_first")

    def __init__(self, first: Histogram, between: Histogram) -> None:
        self._first = first
        self._between = between

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """Tokens that arrived together share the wait."""
        for _ in range(min(num_tokens, 64)):
            self._between.observe(seconds / num_tokens)


class Metrics:
    """All series of one server.

    Args:
        core: read at every scrape.
        base_name: the base's label.
        max_variants: labels of their own; further variants are summed up under "_other".
    """

    def __init__(self, core: _C.Engine, base_name: str, max_variants: int) -> None:
        self.registry = CollectorRegistry()
        self._base_name = base_name
        self._max_variants = max_variants
        self._labels: set[str] = {base_name}
        self._http = Counter(
            "deltazip_http_requests",
            "HTTP requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "deltazip_http_request_seconds",
            "Duration of answers by route.",
            ["route"],
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self.active = Gauge(
            "deltazip_http_active", "Requests being answered.", registry=self.registry
        )
        self._first = Histogram(
            "deltazip_time_to_first_token_seconds",
            "From the request to its first token.",
            ["variant"],
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._between = Histogram(
            "deltazip_inter_token_seconds",
            "Between tokens of one answer.",
            ["variant"],
            buckets=_BETWEEN_TOKENS_S,
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(core, self))

    def label(self, core_name: str) -> str:
        """The series a variant belongs to; the first so many get one of their own."""
        name = core_name or self._base_name
        if name in self._labels:
            return name
        if len(self._labels) >= self._max_variants:
            return OTHER
        self._labels.add(name)
        return name

    def keep_only(self, core_names: set[str]) -> None:
        """Frees the series of variants that are gone."""
        gone = self._labels - core_names - {self._base_name}
        self._labels -= gone
        for name in gone:
            for histogram in (self._first, self._between):
                with contextlib.suppress(KeyError):
                    histogram.remove(name)

    def times(self, core_name: str) -> VariantTimes:
        label = self.label(core_name)
        return VariantTimes(self._first.labels(label), self._between.labels(label))

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._http.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
