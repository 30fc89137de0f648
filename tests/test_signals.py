"""A signal ends a command with its status, wherever in Python it happens to arrive."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlops import signals

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


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def raising(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(signals, "_received", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    signals.raise_on_signals()
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


def test_of_several_signals_the_first_is_heard_and_the_others_do_no_harm(raising: None, monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with signals.heard_once():
        with pytest.raises(signals.Interrupted):
            _interrupt()
        _interrupt()
        signal.raise_signal(signal.SIGTERM)
        with signals.heard_once():
            _interrupt()
        # The inner block's end is not the outer one's.
        _interrupt()
        now += 31
        with pytest.raises(signals.Terminated):
            signal.raise_signal(signal.SIGTERM)
        _interrupt()
        signals.listen_again()
        with pytest.raises(signals.Interrupted):
            _interrupt()
    with pytest.raises(signals.Interrupted):
        _interrupt()


def test_a_signal_that_another_handler_heard_counts_as_the_first(raising: None) -> None:
    signals.pass_over()
    with pytest.raises(signals.Interrupted):
        _interrupt()
    with signals.heard_once():
        signals.pass_over()
        _interrupt()


def test_a_signal_that_a_finalizer_swallowed_is_heard_again(raising: None) -> None:
    class Finalized:
        def __del__(self) -> None:
            _interrupt()

    def finalize_and_wait() -> None:
        Finalized()
        time.sleep(20)

    with signals.heard_once(), pytest.raises(signals.Interrupted):
        finalize_and_wait()


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
