"""A Prometheus histogram for one writer, cheap enough for every token of every stream.

prometheus_client's own takes two locks for an observation and tries one bucket after another.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString  # pyright: ignore[reportUnknownVariableType]


class Histogram:
    """One set of labels. To be observed in one thread; any may collect it."""

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
        self._name = name
        self._text = text
        self._labels = dict(labels)
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        self._created_s = time.time()
        registry.register(self)

    def observe(self, amount: float, count: int = 1) -> None:
        """`count` times the same amount."""
        self._counts[bisect_left(self._bounds, amount)] += count
        self._sum += amount * count

    def describe(self) -> list[Metric]:
        """For the registry, which wants to know the name only."""
        return [Metric(self._name, self._text, "histogram")]

    def collect(self) -> list[Metric]:
        [metric] = self.describe()
        total = 0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            labels = {**self._labels, "le": floatToGoString(bound)}
            metric.add_sample(f"{self._name}_bucket", labels, total)
        metric.add_sample(f"{self._name}_count", self._labels, total)
        metric.add_sample(f"{self._name}_sum", self._labels, self._sum)
        metric.add_sample(f"{self._name}_created", self._labels, self._created_s)
        return [metric]
