"""The service's HTTP routes: the page at / and /predict for people, /v2 for the Open Inference Protocol, /metrics."""

from __future__ import annotations

import asyncio
import base64
import os
import time
import traceback
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match, Route, request_response
from starlette.types import Receive, Scope, Send

from dlops.console import say
from dlops.errors import DlopsError, InputError
from dlops.serve import protocol
from dlops.serve.accounts import Accounts, Caller
from dlops.serve.answers import (
    LENGTH_HEADER,
    TIMEOUT_HEADER,
    TIMING_HEADER,
    NotReadyError,
    Times,
    UnsupportedError,
    deadline_ns,
    error_response,
    http_error,
    infer_response,
    json_length,
    json_response,
    server_timing,
)
from dlops.serve.body import BodyReader, BodyTooLargeError
from dlops.serve.cells import Cells
from dlops.serve.descriptors import allowed_connections
from dlops.serve.guard import REQUEST_ID, Guard, request_id
from dlops.serve.leaving import unless_gone
from dlops.serve.log import Log
from dlops.serve.metrics import CONTENT_TYPE, Metrics
from dlops.serve.model import ServedModel
from dlops.serve.models import Models
from dlops.serve.outcome import Answer
from dlops.serve.pages import Handler, Pages
from dlops.serve.predict import described, read_inputs, wants_picture
from dlops.serve.settings import Settings
from dlops.serve.supervision import CELLS_DIR
from dlops.serve.tracing import PARENT
from dlops.signature import Feed, is_floating
from dlops.version import __version__

if TYPE_CHECKING:
    from dlops.serve.control import Control
    from dlops.serve.grpc_service import GrpcServer

INFER = "/v2/models/{name}/infer"
# In a request's scope: the model that it is for.
_MODEL = "dlops.model"
# Likewise: a function that says whether no other request waits on the connection.
IS_LAST = "dlops.is_last"
# Likewise: the methods that a route has.
_ALLOWED = "dlops.allowed"
# Of what is asked of the repository.
_MAX_CONTROL_BYTES = 64 * 1024
# Of Triton's extensions: what a client may ask for and gets told, in the protocol's own way, that it is not here.
_UNSUPPORTED = (
    "/v2/systemsharedmemory/{rest:path}", "/v2/cudasharedmemory/{rest:path}", "/v2/trace/{rest:path}",
    "/v2/models/{name}/trace/{rest:path}", "/v2/logging",
)  # fmt: skip
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
_GAUGES_S = 0.5
# Of those: how often a broken instance is tried again.
_EXAMINE_TURNS = 10
_EXTENSIONS = [
    "binary_tensor_data", "classification", "model_configuration", "model_repository",
    "model_repository(unload_dependents)", "statistics",
]  # fmt: skip
# A body of this size is decoded on the event loop: in well under a millisecond, which is what a thread would cost.
_INLINE_BYTES = 16 * 1024


class Application:
    """The routes, and what they share. `control` is there once the worker has begun."""

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics(Cells(os.environ.get(CELLS_DIR)))
        self.models = Models()
        self._control: Control | None = None
        self.receive_timeout_s = settings.receive_timeout_s
        self.send_timeout_s = settings.send_timeout_s
        ports = 1 if settings.grpc_port is None else 2
        self.max_connections = settings.max_connections or allowed_connections(ports=ports)
        self.draining = self.awaits_others = False
        self.log = Log(settings.log, access=settings.access_log)
        self.accounts = Accounts(self.metrics, self.log)
        self.grpc: GrpcServer | None = None
        self.bodies = BodyReader(max_bytes=settings.max_body_bytes, max_pending_bytes=settings.max_pending_bytes)
        self.guard = Guard(None if settings.token is None else settings.token.get_secret_value())
        self.asgi = Starlette(routes=self._routes(), exception_handlers={HTTPException: http_error})
        # What GuardMiddleware lets answer where a request has no token.
        self.refuse = request_response(self._answered("other", self.refused))

    @property
    def control(self) -> Control:
        """What models are served, and how that changes. Raises NotReadyError before the worker has begun."""
        if self._control is None:
            raise NotReadyError("the server is starting", hint="GET /v2/health/ready says when it is ready")
        return self._control

    @control.setter
    def control(self, control: Control) -> None:
        self._control = control

    @property
    def is_ready(self) -> bool:
        """Whether new requests should be sent here."""
        is_behind = self._control is not None and self._control.is_behind
        is_broken = any(model.queue.is_broken for model in self.models)
        return self.models.is_loaded and not (self.awaits_others or self.draining or is_behind or is_broken)

    async def keep_gauges(self) -> None:
        """Say again and again how full the queues are: a gauge is summed over workers, whichever of them is asked. And
        try again what is broken."""
        for turn in count():
            try:
                await self._look(examine=turn % _EXAMINE_TURNS == 0)
            except Exception as error:  # noqa: BLE001 - of one look: readiness is told by the next ones
                say(f"dlops: looking at the models failed: {type(error).__name__}: {error}")
            await asyncio.sleep(_GAUGES_S)

    async def _look(self, *, examine: bool) -> None:
        self.metrics.show_load(self.models)
        if self.models.is_loaded:
            self.metrics.ready.set(to=int(self.is_ready))
        for model in list(self.models) if examine else []:
            # Not one that has been replaced while another was examined: it has ended, or will.
            if model in self.models and any(instance.is_broken for instance in model.instances):
                with model.used():
                    await asyncio.to_thread(model.queue.examine)

    def drain(self) -> None:
        """From here on not ready; what comes all the same is answered."""
        self.draining = True
        self.metrics.ready.set(to=0)

    def _routes(self) -> list[Route]:
        model = "/v2/models/{name}"
        versioned = model + "/versions/{version}"
        table: list[tuple[str, str, Handler]] = [
            ("POST", "/predict", self.predict),
            ("POST", "/models/{name}/predict", self.predict),
            ("POST", "/models/{name}/versions/{version}/predict", self.predict),
            ("GET", "/metrics", self.render_metrics),
            *Pages(self.models, self.metrics, self.guard).table(),
            ("GET", "/v2", self.server_metadata),
            ("GET", "/v2/", self.server_metadata),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            ("GET", "/v2/models/stats", self.statistics),
            ("POST", "/v2/repository/index", self.repository_index),
            ("POST", "/v2/repository/models/{name}/load", self.repository_load),
            ("POST", "/v2/repository/models/{name}/unload", self.repository_unload),
            *[
                (method, prefix + path, handler)
                for prefix in (model, versioned)
                for method, path, handler in (
                    ("GET", "", self.model_metadata),
                    ("GET", "/ready", self.model_ready),
                    ("GET", "/config", self.model_config),
                    ("GET", "/stats", self.statistics),
                    ("POST", "/infer", self.infer),
                )
            ],
        ]
        # A version in the address makes no route of its own: the two are counted together.
        routes: list[Route] = [
            _Counted(path, self._answered(label, handler), self._answered(label, self.not_allowed), methods=[method])
            for method, path, handler in table
            for label in [path.replace("/versions/{version}", "")]
        ]
        everything = list(_METHODS[:5])
        for what in _UNSUPPORTED:
            routes.append(Route(what, self._answered("unsupported", self.unsupported), methods=everything))
        routes.append(_Elsewhere("/{rest:path}", self._answered("other", self.unknown), methods=list(_METHODS)))
        return routes

    def _answered(self, route: str, handler: Handler) -> Handler:
        """The handler with its errors as JSON and its answers counted."""

        async def endpoint(request: Request) -> Response:
            started_ns = time.perf_counter_ns()
            try:
                response = await handler(request)
            except HTTPException as error:
                response = await http_error(request, error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nginx's number for it; nobody reads the answer
            except Exception as error:  # noqa: BLE001 - a request that hits a bug of ours gets an answer too
                response = self.failed(error, where=f"{request.method} {route}", caller=_caller(request))
            # What waits behind it on the connection was accepted: the last one's answer ends it.
            if self.draining and request.scope.get(IS_LAST, _always)():
                response.headers["Connection"] = "close"
            model: ServedModel | None = request.scope.get(_MODEL)
            # A client may call a method as it likes; labels are from a fixed set.
            method = request.method if request.method in _METHODS else "other"
            self.accounts.count(
                route, method, response.status_code, model, started_ns, failed=response.status_code >= 400,
                caller=_caller(request),
            )  # fmt: skip
            return response

        return endpoint

    def failed(self, error: Exception, *, where: str, caller: Caller) -> Response:
        """The answer to an error; what was not raised on purpose is the log's, with its trace, and not the client's."""
        if isinstance(error, DlopsError):
            return error_response(error)
        identity = request_id(caller.identity)
        where += "" if identity is None else f", request {identity}"
        say(f"{where}: a bug in dlops\n{''.join(traceback.format_exception(error))}")
        return json_response({"error": "internal error; the server's log has it"}, status=500)

    async def predict(self, request: Request) -> Response:
        """What the task says of images or numbers; a PNG where the model makes pictures and one is asked for."""
        started_ns = time.perf_counter_ns()
        model = self._asked(request)
        with model.used():
            until_ns = deadline_ns(started_ns, header=request.headers.get(TIMEOUT_HEADER))
            self.check_room(model, deadline_ns=until_ns)
            async with self.bodies.read(request) as body:
                received_ns = time.perf_counter_ns()
                kind = request.headers.get("content-type", "")
                with model.queue.expecting(1):
                    raws = await read_inputs(body, kind, model.artifact, offload=model.decoder.offload)
                is_picture = wants_picture(model.artifact, request.headers.get("accept", ""), len(raws))
                feed = await unless_gone(request, model.preprocessed(raws, deadline_ns=until_ns))
                decode_ns = time.perf_counter_ns() - received_ns
                answer = await _run(model, request, feed, rows=len(raws), deadline_ns=until_ns)
        _check_finite(answer.outputs)
        model.check_size(sum(array.nbytes for array in answer.outputs.values()))
        predictions = await described(model, raws, answer.outputs)
        if is_picture:
            content, media_type = base64.b64decode(predictions[0]["image"]), "image/png"
        else:
            document = {"model": model.name, "version": model.version, "predictions": predictions}
            content, media_type = to_json(document), "application/json"
        model.check_size(len(content))
        times = self.accounts.answered(
            model, "/predict", started_ns, answer, rows=len(raws), received_ns=received_ns, decode_ns=decode_ns,
            caller=_caller(request),
        )  # fmt: skip
        return Response(content, media_type=media_type, headers=_timing(request, times))

    async def infer(self, request: Request) -> Response:
        """An inference request of the Open Inference Protocol."""
        started_ns = time.perf_counter_ns()
        model = self._asked(request)
        with model.used():
            header = request.headers.get(TIMEOUT_HEADER)
            self.check_room(model, deadline_ns=deadline_ns(started_ns, header=header))
            async with self.bodies.read(request) as body:
                received_ns = time.perf_counter_ns()
                json_bytes = _json_bytes(request)
                decode = partial(model.codec.decoded, body, json_bytes=json_bytes)
                wanted = decode() if len(body) <= _INLINE_BYTES else await model.decoder.offload(decode)
                until_ns = deadline_ns(started_ns, header=header, timeout_us=wanted.timeout_us)
                feed = wanted.feed
                if wanted.raws:
                    feed = await unless_gone(request, model.preprocessed(wanted.raws, deadline_ns=until_ns))
                decode_ns = time.perf_counter_ns() - received_ns
                answer = await _run(model, request, feed, rows=wanted.rows, deadline_ns=until_ns)
        encoded = model.codec.encoded(answer.outputs, wanted)
        times = self.accounts.answered(
            model, INFER, started_ns, answer, rows=wanted.rows, received_ns=received_ns, decode_ns=decode_ns,
            caller=_caller(request),
        )  # fmt: skip
        return infer_response(encoded, request.headers.get("accept-encoding", ""), _timing(request, times))

    async def live(self, request: Request) -> Response:
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        self._check_ready()
        return Response(status_code=200)

    async def server_metadata(self, request: Request) -> Response:
        return json_response(self.metadata())

    def metadata(self) -> dict[str, Any]:
        """The answer to GET /v2."""
        return {"name": "dlops", "version": __version__, "extensions": _EXTENSIONS}

    async def model_ready(self, request: Request) -> Response:
        self._check_ready(of=self._named(request))
        return Response(status_code=200)

    async def model_metadata(self, request: Request) -> Response:
        return json_response(self.metadata_of(**request.path_params))

    async def model_config(self, request: Request) -> Response:
        return json_response(self._named(request).config())

    async def statistics(self, request: Request) -> Response:
        return json_response(self.statistics_of(**request.path_params))

    def metadata_of(self, name: str, version: str = "") -> dict[str, Any]:
        """The answer to GET /v2/models/NAME. Raises NotReadyError, UnknownModelError."""
        versions = [model.version for model in self.models.versions(name)]
        return self.models.find(name, version).metadata() | {"versions": versions[::-1]}

    def statistics_of(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Of one version, of all versions of one name, or of all models. Raises NotReadyError, UnknownModelError."""
        if version:
            models = [self.models.find(name, version)]
        elif name:
            models = self.models.versions(name)
        else:
            self.models.check_loaded()
            models = list(self.models)
        return {"model_stats": [model.statistics.as_json() for model in models]}

    async def repository_index(self, request: Request) -> Response:
        async with self.bodies.read(request) as body:
            document = _control_document(body)
        ready = document.get("ready", False)
        if not isinstance(ready, bool):
            raise InputError("ready must be true or false", field="ready")
        return json_response(await self.control.index(ready=ready))

    async def repository_load(self, request: Request) -> Response:
        async with self.bodies.read(request) as body:
            document = _control_document(body)
        await self.control.load(request.path_params["name"], parameters=document.get("parameters"))
        return Response(status_code=200)

    async def repository_unload(self, request: Request) -> Response:
        # Whether what depends on it goes too: nothing does.
        async with self.bodies.read(request):
            pass
        await self.control.unload(request.path_params["name"])
        return Response(status_code=200)

    async def render_metrics(self, request: Request) -> Response:
        self.metrics.show_load(self.models)
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def refused(self, request: Request) -> Response:
        raise request.scope["dlops.error"]

    async def unsupported(self, request: Request) -> Response:
        parts = request.url.path.split("/")
        what = "trace" if parts[2] == "models" else parts[2]
        raise UnsupportedError(f"{what} is not supported", hint="send and ask for tensors in the body")

    async def not_allowed(self, request: Request) -> Response:
        allowed = ", ".join(sorted(request.scope[_ALLOWED]))
        raise HTTPException(405, f"{request.method} is not allowed here, but {allowed}", headers={"Allow": allowed})

    async def unknown(self, request: Request) -> Response:
        path = request.url.path
        if path.endswith("/") and not path.startswith("/v2/"):
            return RedirectResponse(request.url.replace(path="/" + path.strip("/")))
        raise HTTPException(404, f"no route {request.method} {request.url.path[:200]}")

    def _check_ready(self, of: ServedModel | None = None) -> None:
        self.models.check_loaded()
        if self.draining:
            raise NotReadyError("the server is shutting down", hint="send requests elsewhere")
        for model in self.models if of is None else [of]:
            if model.queue.is_broken:
                raise NotReadyError(f"{model.title}: no instance runs", hint="it is tried again every few seconds")

    def _named(self, request: Request) -> ServedModel:
        """The model that the address names, or the only one where it names none."""
        if "name" not in request.path_params:
            return self.models.only()
        return self.models.find(request.path_params["name"], request.path_params.get("version", ""))

    def _asked(self, request: Request) -> ServedModel:
        """The same, for a request that counts as one to this model."""
        model: ServedModel = self._named(request)
        request.scope[_MODEL] = model
        return model

    def check_room(self, model: ServedModel, *, deadline_ns: int | None) -> None:
        """Raise OverloadedError where the queue would not take a request: then its body need not be read."""
        refusal = model.queue.refusal(deadline_ns=deadline_ns)
        if refusal is not None:
            raise refusal


class _Counted(Route):
    """What has the address and not the method is answered by `refuse`, which counts it; Starlette's own answer does
    not."""

    def __init__(self, path: str, endpoint: Handler, refuse: Handler, *, methods: list[str]) -> None:
        super().__init__(path, endpoint, methods=methods)
        self._refuse = request_response(refuse)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.methods is not None and scope["method"] not in self.methods:
            await self._refuse({**scope, _ALLOWED: self.methods}, receive, send)
            return
        await super().handle(scope, receive, send)


class _Elsewhere(Route):
    """Taken where no other route is, BentoML's included: those come later than ours, and only a partial match leaves
    them the choice."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return (Match.PARTIAL if match is Match.FULL else match), child_scope


async def _run(model: ServedModel, request: Request, feed: Feed, *, rows: int, deadline_ns: int | None) -> Answer:
    """The queue's answer. A client that leaves meanwhile takes its request out of the queue."""
    return await unless_gone(request, model.queue.submit(feed, rows=rows, deadline_ns=deadline_ns))


def _control_document(body: bytes) -> dict[str, Any]:
    """What asks for something of the repository: a few words, read where everything else waits for it."""
    if len(body) > _MAX_CONTROL_BYTES:
        raise BodyTooLargeError(f"the body is larger than {_MAX_CONTROL_BYTES} bytes", field="body")
    return protocol.read_json(body) if body else {}


def _check_finite(outputs: Feed) -> None:
    """Raise InputError where the model gave NaN or infinity: no label follows from that, and JSON has neither.

    /v2 passes them on, as its clients expect: there the numbers are the answer.
    """
    wrong = [name for name, array in outputs.items() if is_floating(array.dtype) and not np.isfinite(array).all()]
    if wrong:
        raise InputError(
            f"the model's {', '.join(wrong)} is not finite for this input", hint="is an input far out of its range?"
        )


def _always() -> bool:
    return True


def _caller(request: Request) -> Caller:
    return Caller(identity=request.headers.get(REQUEST_ID), parent=request.headers.get(PARENT))


def _json_bytes(request: Request) -> int | None:
    text = request.headers.get(LENGTH_HEADER)
    return None if text is None else json_length(text)


def _timing(request: Request, times: Times) -> dict[str, str]:
    return {"Server-Timing": server_timing(times)} if TIMING_HEADER in request.headers else {}
