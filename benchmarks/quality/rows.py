"""What scripts here that compare variants of one model write."""

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.commit import current_commit


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
