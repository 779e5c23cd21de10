"""What scripts here that compare variants of one model write."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.commit import current_commit


class Named(Protocol):
    """A variant."""

    @property
    def name(self) -> str: ...


AnyVariant = TypeVar("AnyVariant", bound=Named)


def read_arguments(
    about: str | None, variants: Sequence[Named], *, num_tokens: int
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(about or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=num_tokens)
    names = [variant.name for variant in variants]
    parser.add_argument(
        "--variants", nargs="+", choices=names, metavar="NAME", help="beside the first one"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def wanted(variants: Sequence[AnyVariant], names: list[str] | None) -> list[AnyVariant]:
    """The first, to which others are compared, and those of these names; all without any."""
    return [variants[0], *(each for each in variants[1:] if names is None or each.name in names)]


def add_row(rows: list[dict[str, Any]], key: str, name: str, perplexity: float) -> None:
    """With its change to the first."""
    change = perplexity / rows[0]["perplexity"] - 1 if rows else 0.0
    rows.append({key: name, "perplexity": perplexity, "change": change})
    print(rows[-1], flush=True)


def write_rows(out: Path | None, rows: list[dict[str, Any]], num_tokens: int) -> None:
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": current_commit(),
        "device": "CPU",
        "num_tokens": num_tokens,
        "rows": rows,
    }
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")
