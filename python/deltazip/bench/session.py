"""One engine under measurement: requests go in together, arrival times of tokens come out."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from deltazip import _C
from deltazip.bench.workload import Ask

__all__ = ["Session", "Trace", "percentile", "spread"]

_MAX_EVENTS = 4096
_POLL_MS = 100


@dataclass
class Trace:
    """When one request was submitted, when each of its tokens arrived, when it ended. Seconds."""

    submitted: float
    times: list[float] = field(default_factory=list)
    ended: float | None = None

    @property
    def first(self) -> float:
        return self.times[0]

    def gaps(self, begin: float, end: float) -> list[float]:
        """Times between neighbouring tokens that both lie in [begin, end]."""
        inside = [t for t in self.times if begin <= t <= end]
        return [b - a for a, b in itertools.pairwise(inside)]


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Session:
    """Drives a `_C.Engine` from one thread. Close it, or use it as a context manager."""

    def __init__(self, engine: _C.Engine) -> None:
        self.engine = engine
        self.names: list[str] = []  # variants that have slots
        self.cold: list[str] = []  # further ones, which share one
        self._next_id = 1
        self._traces: dict[int, Trace] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.shutdown()

    def add_variants(self, paths: Mapping[str, Path], num_threads: int, num_warm: int) -> None:
        """Validates and advertises, each file on a thread of its own; the first `num_warm` become
        `names`, the others `cold`."""
        with ThreadPoolExecutor(num_threads) as pool:
            jobs = [pool.submit(self.engine.add_variant, n, str(p)) for n, p in paths.items()]
            for job in jobs:
                job.result()
        names = list(paths)
        self.names, self.cold = names[:num_warm], names[num_warm:]

    def states(self) -> dict[str, str]:
        """Variant -> resident, loading, host, disk or draining."""
        return {info.name: info.state for info in self.engine.variants()}

    def submit(self, ask: Ask) -> Trace:
        """Greedy, and to the full length: an end-of-text token ends nothing."""
        sampling = _C.SamplingParams(temperature=0.0, max_tokens=ask.num_output, ignore_eos=True)
        trace = Trace(time.perf_counter())
        self._traces[self._next_id] = trace
        self.engine.submit(self._next_id, ask.variant, ask.prompt, sampling)
        self._next_id += 1
        return trace

    def step(self) -> None:
        """Takes what has arrived, waiting a little for the first.

        Raises:
            RuntimeError: the engine or a request failed.
        """
        events = self.engine.poll(_MAX_EVENTS, _POLL_MS)
        now = time.perf_counter()
        if not events and not (stats := self.engine.stats()).is_alive:
            raise RuntimeError(f"the engine ended: {stats.failure or 'it was closed'}")
        for event in events:
            trace = self._traces.get(event.request_id)
            if trace is None:
                continue
            trace.times += [now] * len(event.tokens)
            finish = event.finish.name
            if finish == "ERROR":
                raise RuntimeError(f"a request failed: {event.error}")
            if finish != "NONE":
                trace.ended = now
                del self._traces[event.request_id]

    def wait(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            self.step()

    def run(self, asks: Sequence[Ask]) -> list[Trace]:
        """All at once, to the end."""
        traces = [self.submit(ask) for ask in asks]
        self.wait(lambda: all(trace.ended is not None for trace in traces))
        return traces

    def cancel_all(self) -> None:
        for request_id in list(self._traces):
            self.engine.cancel(request_id)
        self.wait(lambda: not self._traces)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most, as they are reported."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }
