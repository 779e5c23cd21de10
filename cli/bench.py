"""`tandem bench`: loads an OpenAI-compatible server and reports what its users see."""

from collections.abc import Sequence

from cli.declarations import BENCH
from cli.resolve import resolve
from loadtest.bench import run_bench
from loadtest.config import BenchConfig


def run(argv: Sequence[str]) -> int:
    """0 if every request was answered, 1 if one failed."""
    return run_bench(resolve(BENCH, argv).config(BenchConfig))
