"""The Open Inference Protocol over gRPC, from the process that serves it over HTTP: the same models, queue and limits.

The messages are tritonclient's, which are generated from the protocol's own definition.
https://github.com/kserve/open-inference-protocol and Triton's grpc_service.proto
"""

# ruff: noqa: N802 - the methods are named by the protocol

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from dlops.errors import DlopsError, InputError, MachineError
from dlops.grpc_messages import (
    DecodeError,
    grpc,
    json_format,
    message_factory,
    service_pb2,
    service_pb2_grpc,
)
from dlops.serve import protocol
from dlops.serve.accounts import Caller
from dlops.serve.answers import NotReadyError, UnknownModelError, UnsupportedError, deadline_ns, statuses
from dlops.serve.grpc_codec import check_parts, feed_in, raws_in, response_of, timeout_us, wanted_by
from dlops.serve.guard import REQUEST_ID
from dlops.serve.model import ServedModel
from dlops.serve.outcome import OverloadedError
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from dlops.serve.tls import Tls
from dlops.serve.tracing import PARENT

T = TypeVar("T")
# grpcio has no types.
Context = Any
INFER = "grpc ModelInfer"
# Needs no token, as over HTTP.
_OPEN = ("ServerLive", "ServerReady")
# What a client may ask for and gets told, in the protocol's own way, that it is not here.
_UNSUPPORTED = (
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
)  # fmt: skip
_INFERENCES = ("ModelInfer", "ModelStreamInfer")
# Of a message that is no inference.
_MAX_CONTROL_BYTES = 64 * 1024
# What gRPC can be told.
_LARGEST_MESSAGE = 2**31 - 1
# At once, however large a message of the model may be.
_LEAST_CALLS = 32
# A connection on which nothing is asked for so long is closed; a client opens it again by itself.
_IDLE_S = 60.0
# For what a client has sent on a stream by the time that the server is to end.
_LAST_S = 0.2


class GrpcServer:
    """Listens until `stop`. Made on the event loop on which the queue delivers."""

    def __init__(
        self, application: Application, *, host: str, port: int, settings: Settings, tls: Tls | None = None
    ) -> None:
        # A message is received whole before anybody can look at it, so what all together may take is bounded by their
        # number and by what the models can need; those that may come yet can need anything, and so can a picture.
        max_bytes = settings.max_body_bytes
        models = list(application.models)
        if settings.model_control == "none" and not any(model.raw_input for model in models):
            max_bytes = min(max_bytes, max(protocol.json_limit(model.signature) for model in models))
        self._closing = asyncio.Event()
        most_calls = max(_LEAST_CALLS, settings.max_pending_bytes // max_bytes)
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=most_calls,
            options=[
                ("grpc.max_receive_message_length", min(max_bytes, _LARGEST_MESSAGE)),
                ("grpc.max_send_message_length", -1),
                # Every worker listens on the port, and the kernel shares the connections out.
                ("grpc.so_reuseport", 1),
                # None of these by default, so that who opens connections and asks for nothing would have all of them.
                ("grpc.max_allowed_incoming_connections", application.max_connections),
                ("grpc.server_handshake_timeout_ms", round(1000 * settings.receive_timeout_s)),
                ("grpc.max_connection_idle_ms", round(1000 * _IDLE_S)),
            ],
        )
        servicer = _Servicer(application, self._closing, most_streams=most_calls // 2)
        self._server.add_generic_rpc_handlers((_handlers(servicer),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, tls.for_grpc())
        except RuntimeError as error:
            raise MachineError(f"gRPC on {address}: {error}", hint="choose another DLOPS_GRPC_PORT") from None

    async def start(self) -> None:
        """Accept from here on."""
        await self._server.start()

    async def stop(self, *, grace_s: float) -> None:
        """Accept no more, and wait until what was accepted is answered; streams end after what they were asked."""
        self._closing.set()
        await self._server.stop(grace_s)


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, application: Application, closing: asyncio.Event, *, most_streams: int) -> None:
        self._application = application
        self._closing = closing
        # A stream may be open for hours and ask for nothing, and each is one of the calls at once.
        self._streams, self._most_streams = 0, most_streams

    async def ServerLive(self, request: Any, context: Context) -> Any:
        return await self._answered("ServerLive", context, lambda: service_pb2.ServerLiveResponse(live=True))

    async def ServerReady(self, request: Any, context: Context) -> Any:
        ready = self._application.is_ready
        return await self._answered("ServerReady", context, lambda: service_pb2.ServerReadyResponse(ready=ready))

    async def ModelReady(self, request: Any, context: Context) -> Any:
        def ready() -> Any:
            try:
                model = self._application.models.find(request.name, request.version)
            except (NotReadyError, UnknownModelError):
                return service_pb2.ModelReadyResponse(ready=False)
            return service_pb2.ModelReadyResponse(ready=not (model.queue.is_broken or self._application.draining))

        return await self._answered("ModelReady", context, ready)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        document = self._application.metadata()
        return await self._answered(
            "ServerMetadata", context, lambda: _parsed(document, service_pb2.ServerMetadataResponse())
        )

    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        def metadata() -> Any:
            document = self._application.metadata_of(request.name, request.version)
            return _parsed(document, service_pb2.ModelMetadataResponse())

        return await self._answered("ModelMetadata", context, metadata)

    async def ModelConfig(self, request: Any, context: Context) -> Any:
        def config() -> Any:
            model = self._application.models.find(request.name, request.version)
            return _parsed({"config": model.config()}, service_pb2.ModelConfigResponse())

        return await self._answered("ModelConfig", context, config)

    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        def statistics() -> Any:
            document = self._application.statistics_of(request.name, request.version)
            return _parsed(document, service_pb2.ModelStatisticsResponse())

        return await self._answered("ModelStatistics", context, statistics)

    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        async def index() -> Any:
            rows = await self._application.control.index(ready=request.ready)
            return _parsed({"models": rows}, service_pb2.RepositoryIndexResponse())

        return await self._answered("RepositoryIndex", context, index)

    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        async def load() -> Any:
            await self._application.control.load(request.model_name, parameters=request.parameters)
            return service_pb2.RepositoryModelLoadResponse()

        return await self._answered("RepositoryModelLoad", context, load)

    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        async def unload() -> Any:
            await self._application.control.unload(request.model_name)
            return service_pb2.RepositoryModelUnloadResponse()

        return await self._answered("RepositoryModelUnload", context, unload)

    async def ModelInfer(self, request: Any, context: Context) -> Any:
        return await self._answered(
            "ModelInfer", context, lambda: self._infer(request, context), model=self._asked(request)
        )

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """One answer a request, in their order; an error is an answer here, and the stream goes on."""
        await self._answered("ModelStreamInfer", context, self._check_streams, opens=True)
        self._streams += 1
        try:
            async for answer in self._stream(requests, context):
                yield answer
        finally:
            self._streams -= 1

    def _check_streams(self) -> bool:
        if self._streams >= self._most_streams:
            raise OverloadedError(f"{self._streams} streams are open, which is as many as may be")
        return True

    async def _stream(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in _until(self._closing, requests):
            started_ns = time.perf_counter_ns()
            answer, status = service_pb2.ModelStreamInferResponse(), grpc.StatusCode.OK
            model, identity = None, ""
            try:
                if isinstance(request, InputError):
                    raise request
                model, identity = self._asked(request), request.id
                answer.infer_response.CopyFrom(await self._infer(request, context))
            except DlopsError as error:
                status, answer.error_message = _status(error), str(error)
                answer.infer_response.id = identity
            except Exception as error:  # noqa: BLE001 - a bug of ours is the log's
                status, answer.error_message = grpc.StatusCode.INTERNAL, self._bug(error, "ModelStreamInfer", context)
            self._count("ModelStreamInfer", status, started_ns, model, context)
            yield answer

    async def _answered(
        self, name: str, context: Context, answer: Callable[[], Any], *, model: ServedModel | None = None,
        opens: bool = False,
    ) -> Any:  # fmt: skip
        """The answer, counted; errors end the call with the status that means what HTTP's would.

        opens: that it may begin is no answer yet, and counted is only that it may not.
        """
        started_ns = time.perf_counter_ns()
        status, found = grpc.StatusCode.OK, None
        try:
            self._guard(name, context)
            made = answer()
            found = await made if isinstance(made, Awaitable) else made
        except DlopsError as error:
            status, text = _status(error), str(error)
        except Exception as error:  # noqa: BLE001 - a bug of ours is the log's, and the client gets a line
            status, text = grpc.StatusCode.INTERNAL, self._bug(error, name, context)
        except asyncio.CancelledError:
            self._count(name, grpc.StatusCode.CANCELLED, started_ns, model, context)
            raise
        if found is None or not opens:
            self._count(name, status, started_ns, model, context)
        if found is None:
            await context.abort(status, text)
        return found

    def _count(
        self, name: str, status: grpc.StatusCode, started_ns: int, model: ServedModel | None, context: Context
    ) -> None:
        failed = status is not grpc.StatusCode.OK
        self._application.accounts.count(
            f"grpc {name}", "gRPC", status.name, model, started_ns, failed=failed, caller=_caller(context)
        )

    def _asked(self, request: Any) -> ServedModel | None:
        """The model that is to infer: a failure is not one of a model that is not there."""
        try:
            return self._application.models.find(request.model_name, request.model_version)
        except (NotReadyError, UnknownModelError):
            return None

    def _guard(self, name: str, context: Context) -> None:
        if name not in _OPEN:
            metadata = dict(context.invocation_metadata() or ())
            self._application.guard.check(metadata.get("authorization"))

    def _bug(self, error: Exception, name: str, context: Context) -> str:
        self._application.failed(error, where=f"gRPC {name}", caller=_caller(context))
        return "internal error; the server's log has it"

    async def _infer(self, request: Any, context: Context) -> Any:
        started_ns = time.perf_counter_ns()
        model = self._application.models.find(request.model_name, request.model_version)
        with model.used():
            return await self._run(model, request, context, started_ns)

    async def _run(self, model: ServedModel, request: Any, context: Context, started_ns: int) -> Any:
        application = self._application
        until_ns = deadline_ns(started_ns, header=None, timeout_us=timeout_us(request))
        left_s = context.time_remaining()
        if left_s is not None:
            own_ns = started_ns + int(left_s * 1e9)
            until_ns = own_ns if until_ns is None else min(until_ns, own_ns)
        application.check_room(model, deadline_ns=until_ns)
        held = application.bodies.hold(request.ByteSize())
        try:
            raws = raws_in(request, model.raw_input)
            wanted = wanted_by(request, model.signature)
            if raws:
                feed = await model.preprocessed(raws, deadline_ns=until_ns)
            else:
                feed = feed_in(request, model.signature)
            rows = protocol.rows_of(feed, model.signature)
            decode_ns = time.perf_counter_ns() - started_ns
            answer = await model.queue.submit(feed, rows=rows, deadline_ns=until_ns)
        finally:
            application.bodies.release(held)
        model.codec.check_size(answer.outputs, wanted)
        response = response_of(model, answer.outputs, wanted, identity=request.id)
        application.accounts.answered(
            model, INFER, started_ns, answer, rows=rows, received_ns=started_ns, decode_ns=decode_ns,
            caller=_caller(context),
        )  # fmt: skip
        return response


def _handlers(servicer: _Servicer) -> Any:
    """The protocol's methods. A message that is none is the client's mistake; what the protocol's own code generates
    would have it as one of ours, with a traceback in the log."""
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    handlers = {}
    for method in service.methods:
        streams = method.name == "ModelStreamInfer"
        read = _reader(message_factory.GetMessageClass(method.input_type))
        handler = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = handler(
            servicer.ModelStreamInfer if streams else _reading(servicer, method.name, read),
            # Of a single call it is read once it is known who asks.
            request_deserializer=read if streams else None,
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _reader(kind: Any) -> Callable[[bytes], Any]:
    """The message of such bytes, or the error that says that they are none."""

    def read(body: bytes) -> Any:
        try:
            if kind is service_pb2.ModelInferRequest:
                check_parts(body)
            elif len(body) > _MAX_CONTROL_BYTES:
                return InputError(f"a {kind.DESCRIPTOR.name} of more than {_MAX_CONTROL_BYTES} bytes")
            return kind.FromString(body)
        except DecodeError:
            return InputError(f"the message is no {kind.DESCRIPTOR.name}")
        except InputError as error:
            return error

    return read


def _reading(
    servicer: _Servicer, name: str, read: Callable[[bytes], Any]
) -> Callable[[bytes, Context], Awaitable[Any]]:
    answer = getattr(servicer, name)

    async def refuse(error: DlopsError) -> None:
        raise error

    async def read_and_answer(body: bytes, context: Context) -> Any:
        try:
            servicer._guard(name, context)
            request = read(body)
        except DlopsError as error:
            request = error
        if isinstance(request, DlopsError):
            return await servicer._answered(name, context, partial(refuse, request))
        return await answer(request, context)

    return read_and_answer


def _caller(context: Context) -> Caller:
    """What HTTP has in its headers."""
    metadata = dict(context.invocation_metadata() or ())
    return Caller(identity=metadata.get(REQUEST_ID), parent=metadata.get(PARENT))


async def _until(closing: asyncio.Event, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The requests of a stream, until the server is to end and none of them waits."""
    end = asyncio.ensure_future(closing.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(requests, None))
            await asyncio.wait({coming, end}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                # What has been received is read a moment later.
                await asyncio.wait({coming}, timeout=_LAST_S)
            if not coming.done():
                coming.cancel()
                return
            request = coming.result()
            if request is None:
                return
            yield request
    finally:
        end.cancel()


def _parsed(document: dict[str, Any], message: T) -> T:
    """The JSON answer as the message that has the same fields."""
    json_format.ParseDict(document, message)
    return message


def _status(error: DlopsError) -> grpc.StatusCode:
    return grpc.StatusCode[statuses(error)[1]]


def _refusal(name: str) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    async def refuse(servicer: _Servicer, request: Any, context: Context) -> Any:
        async def nothing() -> Any:
            raise UnsupportedError(f"{name} is not supported")

        return await servicer._answered(name, context, nothing)

    return refuse


for _name in _UNSUPPORTED:
    setattr(_Servicer, _name, _refusal(_name))
