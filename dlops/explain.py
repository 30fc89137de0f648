"""What a person reads where a command failed: one clear line, a hint, and the exit status that goes with them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

_instead: Callable[[str], None] | None = None


def explain(error: Exception) -> int:
    """Say on stderr what an error means, and return its exit status. What is not ours to explain is a bug of ours."""
    from dlops.errors import DlopsError, from_os_error, missing_package

    if isinstance(error, OSError):
        error = from_os_error(error, doing="the command")
    if isinstance(error, ModuleNotFoundError) and not (error.name or "dlops").startswith("dlops"):
        error = missing_package(str(error.name).partition(".")[0], needed_for="this command")
    if isinstance(error, DlopsError):
        return complain(error.message, hint=error.hint, status=error.exit_status)
    from dlops.version import __version__

    traceback.print_exception(error)
    return complain(
        f"this is a bug in dlops {__version__}: {type(error).__name__}: {error}",
        hint="please report it with the lines above and the output of dlops doctor",
        status=70,
    )


def complain(message: str, *, hint: str | None = None, status: int) -> int:
    """Write the line and the hint to stderr, and return the status."""
    if _instead is not None:
        _instead(f"{message} ({hint})" if hint else message)
    else:
        sys.stderr.write(f"dlops: {message}\n" + (f"  {hint}\n" if hint else ""))
    return status


def tell_instead(write: Callable[[str], None] | None) -> None:
    """Let `write` have what a person would read; None for stderr again."""
    global _instead
    _instead = write
