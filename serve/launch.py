"""Start the service from Python or the command line: in the foreground, or as a child for as long as a block lasts."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from dlops.artifact import Artifact
from dlops.console import say
from dlops.errors import MachineError, UsageError, missing_package
from dlops.runtimes.session import Device
from dlops.serve.log import Log
from dlops.serve.ports import authority, keep_port, numeric_host, reachable, usable_port
from dlops.serve.repository import Entry, Repository, absolute, open_entry
from dlops.serve.settings import ModelControl, Settings, variable
from dlops.serve.supervision import ARBITER_PID, CELLS_DIR, FAILURE_FILE, STOP_ON_STDIN_EOF, Family, read_failure
from dlops.serve.tls import Tls

_SERVICE = "dlops.serve.service:Service"
_POLL_S = 0.05
_LOG_TAIL_LINES = 30
_TITLES = 5
_LOOPBACK = "127.0.0.1"


def check_installed() -> None:
    """Raise MachineError where BentoML is not installed; nothing is imported."""
    if importlib.util.find_spec("bentoml") is None:
        raise missing_package("bentoml", extra="serve", needed_for="serving")


def begin_log() -> None:
    """From here on all that this process says is of the form that DLOPS_LOG asks for, as the server's own lines are.

    Raises UsageError where that is none.
    """
    name = variable("log")
    Log(Settings.from_environment({name: os.environ.get(name, "")}).log, access=False).begin()


def serve_artifacts(
    sources: Sequence[Path | str], *, host: str = _LOOPBACK, port: int = 3000, device: Device | None = None,
    threads: int | None = None, workers: int | None = None, trust: bool | None = None, grpc_port: int | None = None,
    model_control: ModelControl | None = None, versions: int | None = None, tls_cert: Path | None = None,
    tls_key: Path | None = None, tls_client_ca: Path | None = None,
) -> int:  # fmt: skip
    """Serve in the foreground until a signal ends it.

    sources: artifacts and folders of artifacts, as `Repository` takes them. port: 0 takes a free one. trust: as in
    SessionOptions. grpc_port: on which gRPC is spoken too; None for not at all. model_control, versions and
    what begins with tls: as in Settings. What is None is as its variable says, or the default.

    Returns the exit status once what was accepted is answered: 0 after SIGTERM, 130 after Ctrl-C; 143 where SIGTERM was
    followed by another signal, which ends the server at once, or where it did not end in order. Raises
    UsageError where there is nothing to serve, MachineError where the port is taken or the device is missing,
    GateError where an artifact fails its self-test.
    """
    address = numeric_host(host)
    port = usable_port(address, port)
    if grpc_port == port:
        raise UsageError(
            f"--port and --grpc-port are both {port}", hint="gRPC has a port of its own; 0 takes a free one"
        )
    # A host that opens HTTP opens gRPC no wider than somebody has said.
    grpc_address = numeric_host(os.environ.get(variable("grpc_host")) or host)
    given = Settings.of(
        artifact=absolute(sources), device=device, threads=threads, workers=workers, trust=trust or None,
        grpc_host=grpc_address if grpc_port is not None or grpc_address != _LOOPBACK else None,
        grpc_port=None if grpc_port is None else usable_port(grpc_address, grpc_port, option="--grpc-port"),
        model_control=model_control, versions=versions, tls_cert=tls_cert, tls_key=tls_key,
        tls_client_ca=tls_client_ca,
    )  # fmt: skip
    # A variable may say what no argument does, and the server reads both. What is wrong is said before it starts.
    settings = Settings.from_environment({**os.environ, **given.to_environment()})
    entries = Repository(sources, versions=settings.versions or None).entries()
    for entry in entries:
        open_entry(entry)
    tls = Tls.from_environment(settings.to_environment())
    if tls is not None:
        tls.check()
    with tempfile.TemporaryDirectory(prefix="dlops-serve-") as folder:
        failure_file = Path(folder) / "failure.json"
        where = f"{'http' if tls is None else 'https'}://{authority(address, port)}"
        say(f"starting {_titles(entries)} on {where} (Ctrl-C ends it)")
        env = {**os.environ, **settings.to_environment()}
        # BentoML's lines about its hooks and workers would be more than those about what is served.
        quiet = [] if os.environ.get("BENTOML_DEBUG") else ["--quiet"]
        process = _start(address, port, failure_file=failure_file, env=env, log=sys.stderr.fileno(), more=quiet)
        received = _wait_forwarding_signals(process)
        failure = read_failure(failure_file)
        if failure is not None:
            raise failure
    if received == [signal.SIGTERM] and process.returncode == 0:
        return 0
    if received:
        return 128 + received[0]
    if process.returncode:
        raise MachineError(f"bentoml serve ended with status {process.returncode}", hint="its output above says why")
    return 0


class ServerProcess:
    """A server in a child process for as long as a `with` block lasts; ready when the block begins.

    sources: artifacts and folders of artifacts.
    port, grpc_port: 0 takes a free one; without a grpc_port there is no gRPC. env: added to the child's environment,
    DLOPS_MAX_QUEUE_ROWS, say; where that has a certificate, `url` is https, and a client's certificate that the server
    asks for is its own. isolated: settings in this process's environment (DLOPS_TOKEN, say) are not the server's.
    `url`, `pid`, `port`, `grpc_port` and `log_path` describe it; the log is deleted at the end of
    the block unless it failed to start.
    """

    def __init__(
        self, *sources: Artifact | Path, host: str = "127.0.0.1", port: int = 0, env: Mapping[str, str] | None = None,
        device: Device | None = None, threads: int | None = None, workers: int | None = None,
        start_timeout_s: float = 120.0,
        stop_timeout_s: float = 20.0, grpc_port: int | None = None, isolated: bool = False,
    ) -> None:  # fmt: skip
        self._settings = Settings.of(
            artifact=absolute([one.directory if isinstance(one, Artifact) else one for one in sources]),
            device=device, threads=threads, workers=workers,
        )  # fmt: skip
        self._wanted_grpc_port = grpc_port
        self._title = ", ".join(one.title if isinstance(one, Artifact) else str(one) for one in sources)
        self._host = host
        self._wanted_port = port
        self._not_inherited = {variable(name) for name in Settings.model_fields} if isolated else set()
        self._env = dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._kept: list[socket.socket | None] = []
        self.port = 0
        self.url = ""
        self.grpc_port: int | None = None

    @property
    def pid(self) -> int:
        """Of the process that starts and watches the workers."""
        assert self._process is not None, "inside the with block only"
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """What the server wrote to stdout and stderr so far."""
        assert self._folder is not None, "inside the with block only"
        return Path(self._folder.name) / "server.log"

    def __enter__(self) -> Self:
        address = numeric_host(self._host)
        self.port = usable_port(address, self._wanted_port)
        inherited = {name: value for name, value in os.environ.items() if name not in self._not_inherited}
        tls = Tls.from_environment({**inherited, **self._env})
        self.url = f"{'http' if tls is None else 'https'}://{authority(reachable(address), self.port)}"
        settings = self._settings
        if self._wanted_grpc_port is not None:
            self.grpc_port = usable_port(address, self._wanted_grpc_port, option="--grpc-port")
            settings = settings.model_copy(update={"grpc_host": address, "grpc_port": self.grpc_port})
        self._folder = tempfile.TemporaryDirectory(prefix="dlops-serve-")
        failure_file = Path(self._folder.name) / "failure.json"
        try:
            self._kept.append(keep_port(address, self.port))
            if self.grpc_port is not None:
                self._kept.append(keep_port(address, self.grpc_port, option="--grpc-port"))
            with self.log_path.open("wb") as log:
                self._process = _start(
                    address,
                    self.port,
                    failure_file=failure_file,
                    log=log.fileno(),
                    env={**inherited, **settings.to_environment(), **self._env},
                )
            self._wait_until_ready(reachable(address), failure_file, tls)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and everything that it started; answers what it accepted first. Safe to call twice.

        After `stop_timeout_s` whatever still runs, workers in the middle of an answer too, is killed.
        """
        process, self._process = self._process, None
        if process is not None:
            _end(process, timeout_s=self._stop_timeout_s)
        kept, self._kept = self._kept, []
        for keeper in kept:
            if keeper is not None:
                keeper.close()
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()

    def log_tail(self) -> str:
        """The last lines of the log."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _wait_until_ready(self, address: str, failure_file: Path, tls: Tls | None) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            ended = self._process.poll() is not None
            failure = read_failure(failure_file)
            if failure is not None:
                raise failure
            if ended:
                raise MachineError(
                    f"{self._title}: the server ended with status {self._process.returncode} before it was ready; "
                    f"its log ends:\n{self.log_tail()}"
                )
            if _is_ready(address, self.port, tls):
                return
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{self._title}: the server was not ready within {self._start_timeout_s:g} s; "
                    f"its log ends:\n{self.log_tail()}"
                )
            time.sleep(_POLL_S)


def _titles(entries: Sequence[Entry]) -> str:
    shown = ", ".join(entry.title for entry in entries[:_TITLES])
    return shown + (f" and {len(entries) - _TITLES} more" if len(entries) > _TITLES else "")


def _start(
    address: str, port: int, *, failure_file: Path, env: Mapping[str, str], log: int, more: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """env: all that the server's environment is to be, what this module adds apart. more: options of bentoml serve."""
    check_installed()
    command = [sys.executable, "-m", "bentoml", "serve", _SERVICE, "--host", address, "--port", str(port), *more]
    child_env = dict(env)
    # A server within a server's environment would take that one's places for its own.
    for name in (ARBITER_PID, CELLS_DIR):
        child_env.pop(name, None)
    child_env |= {FAILURE_FILE: str(failure_file), STOP_ON_STDIN_EOF: "1"}
    child_env.setdefault("BENTOML_DO_NOT_TRACK", "True")
    return subprocess.Popen(
        command,
        env=child_env,
        # Held open by this process: should it be killed, the server reads the end of it and ends too.
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        # Its own session, so that Ctrl-C reaches it once, through us, and that all of it can be ended at once.
        start_new_session=True,
    )


def _wait_forwarding_signals(process: subprocess.Popen[bytes]) -> list[int]:
    """Wait for the child; SIGINT and SIGTERM end it, a second one at once, its workers included.

    Returns those that were received.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process.poll() is None:
            if len(received) == 1:
                process.send_signal(signal.SIGTERM)
            else:
                Family(process).kill()

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.wait()
    finally:
        _end(process, timeout_s=0.0)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return received


def _end(process: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    # Taken while the arbiter lives: its workers are strangers to us once it is gone.
    family = Family(process)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            say(f"the server did not end within {timeout_s:g} s and is killed")
    family.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _is_ready(address: str, port: int, tls: Tls | None) -> bool:
    connection = (
        http.client.HTTPConnection(address, port, timeout=5)
        if tls is None
        else http.client.HTTPSConnection(address, port, timeout=5, context=tls.for_asking_itself())
    )
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
