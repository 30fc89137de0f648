"""The BentoML service: `bentoml serve` in the project folder, or `dlops serve`, runs this.

The process that starts the workers picks the artifacts; each worker loads them, runs their samples through them, and
turns ready only then. A worker in which one fails at the start says why in one line and ends the whole server.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from pathlib import Path
from typing import NoReturn

from dlops.console import say
from dlops.errors import DlopsError, UsageError
from dlops.serve import supervision
from dlops.serve.ports import authority, claim_port, hold_port, kept_free_port, numeric_host, usable_port
from dlops.serve.settings import Settings, variable
from dlops.serve.tls import Tls

# Usage is reported to BentoML only where the user says so, with BENTOML_DO_NOT_TRACK=False.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")


# How long calls over gRPC may go on that were accepted before the end.
_GRPC_GRACE_S = 60.0
_AGAIN_S = 5.0
# How often a worker that loads looks whether it is to end.
_LOOK_S = 0.2
# And whether the others have loaded, too.
_OTHERS_S = 0.05


def _stop(error: DlopsError) -> NoReturn:
    say(f"dlops: {error}")
    sys.exit(error.exit_status)


try:
    settings = Settings.from_environment()
    tls = Tls.from_environment(os.environ)
    if tls is not None:
        tls.check()
except UsageError as error:
    _stop(error)

import bentoml  # noqa: E402
import bentoml._internal.utils  # noqa: E402
import click  # noqa: E402
from bentoml._internal.configuration.containers import BentoMLContainer  # noqa: E402
from bentoml._internal.utils.analytics import usage_stats  # noqa: E402

from dlops.serve import arbiter, door, time_limit  # noqa: E402
from dlops.serve.control import Control, State, write_state  # noqa: E402
from dlops.serve.descriptors import raise_limit  # noqa: E402
from dlops.serve.drain import drain_on_sigterm  # noqa: E402
from dlops.serve.gpus import take_own_gpu  # noqa: E402
from dlops.serve.guard import GuardMiddleware  # noqa: E402
from dlops.serve.handshake import count_handshakes  # noqa: E402
from dlops.serve.repository import Repository, absolute, open_entry  # noqa: E402
from dlops.serve.routes import Application  # noqa: E402
from dlops.serve.tracing import Tracer  # noqa: E402

# BentoML's command line asks, and remembers the answer, before it imports this module.
usage_stats.do_not_track.cache_clear()

raise_limit()
application = Application(settings)
application.log.begin()
# On the one port that BentoML opens, with its own routes.
_has_door = door.install(application)
time_limit.install()


@bentoml.asgi_app(application.asgi, path="/")
@bentoml.service(
    name="dlops",
    workers=settings.workers,
    # BentoML's own default is 0.0.0.0: every network that the machine is in.
    http={"host": "127.0.0.1"},
    # Its metrics take the raw path as a label, so junk URLs grow them without bound; ours are in dlops.serve.metrics.
    metrics={"enabled": False},
    # A span and a log line a request cost more than the inference of a small model.
    tracing={"excluded_urls": ".*"},
    logging={"access": {"enabled": False}},
    **({} if tls is None else {"ssl": tls.for_bentoml()}),
    endpoints={"livez": "/v2/health/live", "readyz": "/v2/health/ready"},
)
class Service:
    """/predict for people, /v2 for Triton's clients."""

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def choose() -> None:
        """Pick what is served once, for all workers, in the process that starts them."""
        try:
            _check_address()
            state = State(generation=1, entries=_repository().entries())
            for entry in state.entries:
                open_entry(entry)
            port = None if settings.grpc_port is None else hold_port(settings.grpc_host, settings.grpc_port)
        except DlopsError as error:
            _stop(error)
        # What is relative means the folder in which the server was started.
        os.environ |= Settings(artifact=absolute(settings.artifact)).to_environment()
        if port is not None:
            # The same for all workers, and held for them.
            os.environ[variable("grpc_port")] = str(port)
        # BentoML finds the two ports on which its arbiter is told things, lets them go and opens them a moment later,
        # when another process may have them.
        bentoml._internal.utils.reserve_free_port = kept_free_port  # type: ignore[assignment]
        arbiter.install()
        supervision.become_arbiter()
        write_state(Path(os.environ[supervision.CELLS_DIR]), state)

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def begin(self) -> None:
        """Load in the background: the process is live at once, and ready when the self-test has passed."""
        # BentoML has set up its own lines by now.
        application.log.begin()
        supervision.end_with_arbiter()
        worker = bentoml.server_context.worker_index or 1
        take_own_gpu(worker, settings)
        application.awaits_others = settings.workers > 1
        if _has_door:
            count_handshakes(asyncio.get_running_loop(), timeout_s=settings.receive_timeout_s)
        drain_on_sigterm(application.drain, delay_s=settings.drain_delay_s)
        application.control = Control(
            application.models, _repository(), settings, application.metrics, Path(os.environ[supervision.CELLS_DIR]),
            worker=worker,
        )  # fmt: skip
        self._loading = asyncio.create_task(_load(worker))
        self._refreshing = asyncio.create_task(application.keep_gauges())
        if application.metrics.any_ready():
            # In the place of one that has ended: until it can answer, the others take what comes. What loads may go on
            # for ever, as it follows what is loaded later.
            while not (self._loading.done() or application.models.is_loaded or application.draining):
                await asyncio.wait({self._loading}, timeout=_LOOK_S)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def end(self) -> None:
        """Answer what waits, then free the models."""
        application.metrics.ready.set(to=0)
        self._refreshing.cancel()
        if application.grpc is not None:
            await application.grpc.stop(grace_s=_GRPC_GRACE_S)
        self._loading.cancel()
        await application.control.end()
        if application.accounts.tracer is not None:
            await asyncio.to_thread(application.accounts.tracer.close)

    def __is_ready__(self) -> bool:
        return application.is_ready


# The decorator has made a service of the class.
Service.add_asgi_middleware(  # type: ignore[attr-defined]
    GuardMiddleware, guard=application.guard, refuse=application.refuse
)


def _check_address() -> None:
    """Before anything starts: from BentoML a taken port is a traceback. Raises MachineError."""
    command = click.get_current_context(silent=True)
    said = {} if command is None else command.params
    http = BentoMLContainer.http
    host, port = said.get("host"), said.get("port")
    address = numeric_host(str(http.host.get() if host is None else host))
    claim_port(address, usable_port(address, int(http.port.get() if port is None else port)))


async def _load(worker: int) -> None:
    control = application.control
    try:
        if settings.trace_sample:
            application.accounts.tracer = Tracer(settings.trace_sample)
        await control.begin()
        if settings.grpc_port is not None:
            await _start_grpc()
    except DlopsError as error:
        await _give_up(worker, error)
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, a worker that can never turn ready must end
        await _give_up(worker, DlopsError(f"loading failed: {type(error).__name__}: {error}"))
        return
    supervision.note_served(worker)
    application.models.is_loaded = True
    if worker > 1:
        say(f"worker {worker} of {settings.workers}: self-test passed, ready")
    # A full collection of a large heap would stall requests; what is loaded by now stays until the end.
    gc.collect()
    gc.freeze()
    # What comes is accepted by any: one alone that is ready would bring others what they cannot answer yet.
    while not all(supervision.has_served(other) for other in range(1, settings.workers + 1)):
        await asyncio.sleep(_OTHERS_S)
    application.awaits_others = False
    if not application.draining:
        application.metrics.ready.set(to=1)
    if settings.model_control == "explicit":
        await control.follow()


async def _give_up(worker: int, error: DlopsError) -> None:
    """End the server where no worker of this number ever loaded, else this one: another is started in its place."""
    if not supervision.has_served(worker):
        supervision.end_server(error)
        return
    say(f"dlops: a worker cannot load, and is started again in {_AGAIN_S:g} s: {error}")
    # Else it would be started again as fast as it fails.
    await asyncio.sleep(_AGAIN_S)
    os._exit(error.exit_status)


async def _start_grpc() -> None:
    from dlops.serve.grpc_service import GrpcServer

    assert settings.grpc_port is not None
    application.grpc = GrpcServer(
        application, host=settings.grpc_host, port=settings.grpc_port, settings=settings, tls=tls
    )
    await application.grpc.start()
    say(f"gRPC on {authority(settings.grpc_host, settings.grpc_port)}")


def _repository() -> Repository:
    return Repository(settings.artifact, versions=settings.versions or None)
