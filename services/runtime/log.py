"""Log lines for people or for machines, on stderr."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any


def configure_logging(*, level: str, log_format: str) -> None:
    """Sets up the process's root logger; `log_format` is "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """`12:34:56.789 WARNING message`; the level is left out where nothing is wrong."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        del datefmt
        return datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        level = "" if record.levelno <= logging.INFO else f"{record.levelname} "
        return f"{self.formatTime(record)} {level}{record.getMessage()}"

    def usesTime(self) -> bool:  # noqa: N802
        return True


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, and the message or the `fields` behind it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields: object = record.__dict__.get("fields")
        if isinstance(fields, dict):
            line["event"] = record.getMessage().split(" ", 1)[0]
            line |= fields
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
