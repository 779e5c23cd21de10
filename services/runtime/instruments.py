"""A Prometheus counter and histogram for one writer, cheap enough for every token of every stream.

prometheus_client's own take locks, and its histogram tries one bucket after another.
"""

import math
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString  # pyright: ignore[reportUnknownVariableType]


class _Instrument(ABC):
    """One set of labels. To be changed in one thread; any may collect it."""

    kind: str

    def __init__(
        self, name: str, text: str, *, labels: Mapping[str, str], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._text = text
        self._labels = dict(labels)
        self._created_s = time.time()
        registry.register(self)

    def describe(self) -> list[Metric]:
        """For the registry, which wants to know the name only."""
        return [Metric(self._name, self._text, self.kind)]

    def collect(self) -> list[Metric]:
        [metric] = self.describe()
        for suffix, labels, value in (*self._samples(), ("created", {}, self._created_s)):
            metric.add_sample(f"{self._name}_{suffix}", self._labels | labels, value)
        return [metric]

    @abstractmethod
    def _samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Suffix of the name, further labels, value."""


class Counter(_Instrument):
    kind = "counter"

    def __init__(
        self, name: str, text: str, *, labels: Mapping[str, str], registry: CollectorRegistry
    ) -> None:
        self._total = 0.0
        super().__init__(name, text, labels=labels, registry=registry)

    def inc(self, amount: float = 1) -> None:
        """`amount` isn't negative."""
        self._total += amount

    def _samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        yield "total", {}, self._total


class Histogram(_Instrument):
    kind = "histogram"

    def __init__(
        self,
        name: str,
        text: str,
        buckets: Sequence[float],
        *,
        labels: Mapping[str, str],
        registry: CollectorRegistry,
    ) -> None:
        """`buckets` are upper bounds in rising order, the last of them finite."""
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        super().__init__(name, text, labels=labels, registry=registry)

    def observe(self, amount: float, count: int = 1) -> None:
        """`count` times the same amount."""
        self._counts[bisect_left(self._bounds, amount)] += count
        self._sum += amount * count

    def _samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        total = 0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            yield "bucket", {"le": floatToGoString(bound)}, total
        yield "count", {}, total
        yield "sum", {}, self._sum
