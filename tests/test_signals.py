"""A signal ends a command with its status, wherever in Python it happens to arrive."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# What the command line would be doing when the signal comes.
MOMENTS = {
    "in plain code": "send()",
    "in code run from a string, as dataclasses are made": 'exec("send()", {"send": send})',
    "in an import of an extension module, which then says ImportError": (
        "try: send()\n    except BaseException: raise ImportError('initialization failed')"
    ),
    "in a finalizer, where exceptions are forgotten": "Finalized()\n    time.sleep(20)",
}
COMMAND = """
import signal, sys, time
import dlops.__main__, dlops.cli

def send():
    signal.raise_signal({number})

class Finalized:
    def __del__(self): send()

def run(arguments):
    {moment}
    return 0

dlops.cli.run = run
dlops.__main__.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=list(MOMENTS))
def test_a_signal_decides_the_status_and_shows_no_traceback(
    moment: str, number: signal.Signals, tmp_path: Path
) -> None:
    # The status is what run(...) raised or returned; in the real command it goes through cli.run, tested below.
    code = COMMAND.format(number=int(number), moment=moment)
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert answer.returncode == (130 if number == signal.SIGINT else 143)
    assert answer.stderr == ("dlops: interrupted\n" if number == signal.SIGINT else "dlops: terminated\n")


def test_an_error_that_a_signal_caused_is_not_taken_for_a_fault_of_the_installation(tmp_path: Path) -> None:
    code = (
        "import signal, dlops.__main__, dlops.cli as cli\n"
        "def listing():\n"
        "    try: signal.raise_signal(signal.SIGINT)\n"
        "    except BaseException: raise ImportError('initialization failed') from None\n"
        "cli.app.command('broken')(listing)\n"
        "import sys; sys.argv = ['dlops', 'broken']\n"
        "dlops.__main__.main()"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (130, "dlops: interrupted\n")


def test_an_exit_without_a_signal_keeps_its_status(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "dlops", "--nope"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
