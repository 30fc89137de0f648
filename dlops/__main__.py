"""The `dlops` command, from its first instant: signals are answered before anything slow is imported."""

from __future__ import annotations

import sys
from typing import NoReturn

from dlops import signals
from dlops.explain import complain


def main() -> NoReturn:
    """Run the command line that the process was started with. Exits with its status."""
    signals.raise_on_signals()
    try:
        from dlops.cli import run

        status = run(sys.argv[1:])
    except BaseException:
        if (interrupted := signals.received_status()) is None:
            raise
        status = interrupted
    signals.die_on_signals()
    if status in (130, 143):
        # A command that keeps its work ends alike on both; which it was decides.
        status = signals.received_status() or status
        complain("interrupted" if status == 130 else "terminated", status=status)
    sys.exit(status)


if __name__ == "__main__":
    main()
