"""Which code a result is of."""

import subprocess


def current_commit() -> str:
    """Empty where there is no git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
