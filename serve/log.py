"""What the service writes to stderr: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import secrets
import sys
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from dlops import console, explain

Form = Literal["text", "json"]


class Log:
    """access: whether each request that was answered has a line."""

    def __init__(self, form: Form, *, access: bool) -> None:
        self._form = form
        self.access = access

    def begin(self) -> None:
        """From here on all that this process says is of this form, BentoML's own lines too."""
        if self._form == "text":
            return
        console.tell_instead(_write)
        explain.tell_instead(partial(_write, level="error"))
        for logger in (logging.getLogger(), *map(logging.getLogger, ("bentoml", "bentoml.server", "circus"))):
            for handler in logger.handlers:
                handler.setFormatter(_Formatter())

    def answered(self, *, route: str, method: str, status: str, model: str, ms: float, identity: str | None) -> None:
        """One request. identity: what its client calls it; one is drawn where it says nothing."""
        identity = identity or secrets.token_hex(8)
        if self._form == "text":
            console.say(f"{method} {route} {model or '-'} {status} {ms:.3f} ms {identity}")
            return
        _write(
            "answered", request=identity, method=method, route=route, model=model, status=status, ms=round(ms, 3)
        )  # fmt: skip


def _line(message: str, level: str, **fields: object) -> str:
    # To the millisecond, as all logs' readers take it.
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "level": level, "message": message, **fields})


def _write(message: str, level: str = "info", **fields: object) -> None:
    # In one call: several workers write to the same file.
    sys.stderr.write(_line(message, level, **fields) + "\n")
    sys.stderr.flush()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return _line(text, record.levelname.lower(), logger=record.name)
