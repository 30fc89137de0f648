"""The BentoML service: `bentoml serve` in the project folder, or `dlops serve`, runs this.

The process that starts the workers picks the artifact; each worker loads it, runs its samples through it, and turns
ready only then. A worker whose artifact fails says why in one line and ends the whole server.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import NoReturn

from dlops.console import say
from dlops.errors import DlopsError, UsageError
from dlops.serve import supervision
from dlops.serve.ports import authority, hold_port
from dlops.serve.settings import Settings, variable

# Usage is reported to BentoML only where the user says so, with BENTOML_DO_NOT_TRACK=False.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")


# How long calls over gRPC may go on that were accepted before the end.
_GRPC_GRACE_S = 60.0


def _stop(error: DlopsError) -> NoReturn:
    say(f"dlops: {error}")
    sys.exit(error.exit_status)


try:
    settings = Settings.from_environment()
except UsageError as error:
    _stop(error)

import bentoml  # noqa: E402
from bentoml._internal.utils.analytics import usage_stats  # noqa: E402

from dlops.serve import door  # noqa: E402
from dlops.serve.drain import drain_on_sigterm  # noqa: E402
from dlops.serve.guard import GuardMiddleware  # noqa: E402
from dlops.serve.model import ServedModel, choose_artifact, load_model  # noqa: E402
from dlops.serve.routes import Application  # noqa: E402

# BentoML's command line asks, and remembers the answer, before it imports this module.
usage_stats.do_not_track.cache_clear()

application = Application(settings)
# On the one port that BentoML opens, with its own routes.
door.install(application)


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
    endpoints={"livez": "/v2/health/live", "readyz": "/v2/health/ready"},
)
class Service:
    """One artifact: /predict for people, /v2 for Triton's clients."""

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def choose() -> None:
        """Pick the artifact once, for all workers, in the process that starts them."""
        try:
            artifact = choose_artifact(settings)
            port = None if settings.grpc_port is None else hold_port(settings.grpc_host, settings.grpc_port)
        except DlopsError as error:
            _stop(error)
        os.environ[variable("artifact")] = str(artifact.directory.resolve())
        if port is not None:
            # The same for all workers, and held for them.
            os.environ[variable("grpc_port")] = str(port)
        supervision.become_arbiter()

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def begin(self) -> None:
        """Load in the background: the process is live at once, and ready when the self-test has passed."""
        supervision.end_with_arbiter()
        drain_on_sigterm(application.drain, delay_s=settings.drain_delay_s)
        self._loading = asyncio.create_task(_load())
        self._refreshing = asyncio.create_task(application.keep_gauges())

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def end(self) -> None:
        """Answer what waits, then free the model."""
        application.metrics.ready.set(to=0)
        self._refreshing.cancel()
        if application.grpc is not None:
            await application.grpc.stop(grace_s=_GRPC_GRACE_S)
        model, application.model = application.model, None
        self._loading.cancel()
        if model is not None:
            await asyncio.to_thread(model.close)

    def __is_ready__(self) -> bool:
        return application.is_ready


# The decorator has made a service of the class.
Service.add_asgi_middleware(  # type: ignore[attr-defined]
    GuardMiddleware, guard=application.guard, refuse=application.refuse
)


async def _load() -> None:
    try:
        model = await asyncio.to_thread(_open)
        if settings.grpc_port is not None:
            await _start_grpc(model)
    except DlopsError as error:
        supervision.end_server(error)
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, a server that can never turn ready must end
        supervision.end_server(DlopsError(f"loading failed: {type(error).__name__}: {error}"))
        return
    # A full collection of a large heap would stall requests; what is loaded by now stays until the end.
    gc.collect()
    gc.freeze()
    application.model = model
    if not application.draining:
        application.metrics.ready.set(to=1)
    application.metrics.instances.set(to=len(model.instances))
    application.metrics.model.set(*model.describe().values(), to=1)
    placement = model.placement
    say(
        f"serving {model.artifact.title} version {model.version} on {placement.provider} ({placement.runtime}, "
        f"{placement.precision}, {placement.threads} threads): self-test passed, ready"
        + ("" if settings.grpc_port is None else f"; gRPC on {authority(settings.grpc_host, settings.grpc_port)}")
    )


async def _start_grpc(model: ServedModel) -> None:
    from dlops.serve.grpc_service import GrpcServer

    assert settings.grpc_port is not None
    application.grpc = GrpcServer(
        application, model.signature, host=settings.grpc_host, port=settings.grpc_port, settings=settings
    )
    await application.grpc.start()


def _open() -> ServedModel:
    return load_model(choose_artifact(settings), settings, application.metrics)
