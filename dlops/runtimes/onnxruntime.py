"""ONNX Runtime on the CPU, CUDA or TensorRT, with the provider that was asked for or an error."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnxruntime as ort

from dlops.artifact import Artifact
from dlops.console import say
from dlops.cudart import Stream
from dlops.environment import available_cores
from dlops.errors import CorruptError, MachineError, first_line
from dlops.runtimes import tensorrt_provider
from dlops.runtimes.session import Placement, SessionOptions, check_bound, check_graph, graph_provider
from dlops.signature import Array, Feed, Signature

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": tensorrt_provider.PROVIDER}
_ERRORS_ONLY = 3
# ONNX Runtime's number for runs that neither capture nor replay a graph.
_NO_GRAPH = -1
# It captures a graph in the first run or in the one after.
_CAPTURE_RUNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    session: ort.InferenceSession
    stream: Stream | None


class OnnxSession:
    """One InferenceSession and the names of its outputs."""

    def __init__(
        self, model: str | bytes, *, signature: Signature, precision: str, options: SessionOptions, title: str,
        engines: tensorrt_provider.Engines | None = None,
    ) -> None:  # fmt: skip
        """engines: where TensorRT's are kept; closed with the session."""
        self._engines = engines
        threads = options.threads or available_cores()
        device = choose_device(options)
        where = "cpu" if device == "cpu" else "cuda"
        check_graph(options, where)
        settings = _session_options(threads, options, precision)
        on_tensorrt = (
            tensorrt_provider.provider_options(signature, precision, folder=None if engines is None else engines.path)
            if device == "tensorrt"
            else {}
        )
        try:
            opened = _open(model, settings, device, options, title, on_tensorrt)
        except (MachineError, CorruptError) as error:
            # A graph is CUDA's alone, whatever else was left open.
            if device == "cpu" or options.device != "auto" or options.cuda_graph:
                raise
            # A file that cannot be loaded at all says so here, too.
            opened = _open(model, settings, "cpu", options, title)
            device = where = "cpu"
            reason = error.message.removeprefix(f"{title}: ")
            say(f"{title}: runs on the CPU, because it does not on CUDA: {reason} (dlops doctor shows what works)")
        self._session, self._stream = opened.session, opened.stream
        self.signature = signature
        self._device = where
        self._graphs = itertools.count() if options.cuda_graph else None
        self._run_options = _run_options(graph=None if self._graphs is None else _NO_GRAPH)
        self._outputs = [spec.name for spec in signature.outputs]
        self.placement = Placement(
            runtime="onnxruntime", device="cuda:0" if where == "cuda" else "cpu",
            provider=graph_provider(_PROVIDERS[device], options), precision=_computed(precision, device),
            threads=threads, nodes=_assigned(self._session),
        )  # fmt: skip

    def run(self, feed: Feed) -> Feed:
        outputs: list[Any] = self._session.run(self._outputs, dict(feed), self._run_options)
        return dict(zip(self._outputs, outputs, strict=True))

    def bind(self, feed: Feed) -> OnnxBound:
        """Through IO binding."""
        return OnnxBound(
            self._session, feed, self.run(feed), signature=self.signature, device=self._device, stream=self._stream,
            graph=None if self._graphs is None else next(self._graphs),
        )  # fmt: skip

    def end_profile(self) -> Path:
        """The file of every operator that ran so far, in Chrome's trace format; for a session with a profile_prefix."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        del self._session
        if self._stream is not None:
            self._stream.close()
        if self._engines is not None:
            self._engines.close()


class OnnxBound:
    """An IO binding over buffers that ONNX Runtime allocated on the session's device."""

    def __init__(
        self, session: ort.InferenceSession, feed: Feed, outputs: Feed, *, signature: Signature, device: str,
        stream: Stream | None = None, graph: int | None = None,
    ) -> None:  # fmt: skip
        """outputs: what the session gives for the feed. graph: the number of the CUDA graph that runs replay.

        Raises MachineError where there can be no graph.
        """
        self._session, self._stream = session, stream
        # A replay of a graph waits for its end inside ONNX Runtime, whatever the run's options say.
        self.enqueues = stream is not None and graph is None
        self._run_options = _run_options(graph=graph, wait=not self.enqueues)
        self._binding = session.io_binding()
        self._names = [spec.name for spec in signature.outputs]
        self._like = {spec.name: feed[spec.name] for spec in signature.inputs}
        self._inputs = {name: _buffer(array, device) for name, array in self._like.items()}
        for name, buffer in self._inputs.items():
            self._binding.bind_ortvalue_input(name, buffer)
        self._device = device
        self._unsized: list[str] = []
        given = {dim for spec in signature.inputs for dim in spec.shape}
        for spec in signature.outputs:
            if any(isinstance(dim, str) and dim not in given for dim in spec.shape):
                self._unsized.append(spec.name)
                self._binding.bind_output(spec.name, device, 0)
            else:
                self._binding.bind_ortvalue_output(spec.name, _buffer(outputs[spec.name], device))
        if graph is not None and self._unsized:
            raise MachineError(
                f"no CUDA graph: the size of the output {self._unsized[0]} depends on the data",
                hint="leave --cuda-graph (of a service: DLOPS_CUDA_GRAPHS) out",
            )
        self.copy_in(feed)
        for _ in range(_CAPTURE_RUNS if graph is not None else 0):
            self.run()
        self.synchronize()

    @property
    def stream(self) -> int | None:
        return None if self._stream is None else self._stream.handle

    def copy_in(self, feed: Feed) -> None:
        check_bound(self._like, feed)
        for name, buffer in self._inputs.items():
            buffer.update_inplace(feed[name])
        # A copy from pageable memory may go on after the call on the default stream, which the model does not use.
        self._binding.synchronize_inputs()

    def run(self) -> None:
        for name in self._unsized:
            # Its size may depend on the data, and what a run allocated is the buffer of the next unless bound anew.
            self._binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(self._binding, self._run_options)

    def synchronize(self) -> None:
        if self._stream is None:
            self._binding.synchronize_outputs()
        else:
            self._stream.synchronize()

    def copy_out(self) -> Feed:
        return dict(zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True))


def open_session(artifact: Artifact, options: SessionOptions) -> OnnxSession:
    def opened(engines: tensorrt_provider.Engines | None) -> OnnxSession:
        return OnnxSession(
            str(artifact.path("model")), signature=artifact.signature, precision=artifact.variant.precision,
            options=options, title=artifact.title, engines=engines,
        )  # fmt: skip

    if options.device != "tensorrt":
        return opened(None)
    choose_device(options)
    engines = tensorrt_provider.open_engines(artifact, options, onnxruntime=ort.__version__)
    if engines.is_empty:
        say(f"{artifact.title}: TensorRT builds its engine, which may take minutes; it is kept with the artifact")
    try:
        session = opened(engines)
    except BaseException:
        engines.close()
        raise
    # Now, and not only at the end: a server that is killed should not have to build it again.
    engines.keep()
    return session


def cuda_works() -> bool:
    """Whether this build of ONNX Runtime has CUDA and there is a device for it."""
    from dlops.environment import describe_environment

    if "CUDAExecutionProvider" not in ort.get_available_providers() or not describe_environment().gpus:
        return False
    # Loads the CUDA libraries that pip installed beside it, without torch.
    ort.preload_dlls()
    return True


def choose_device(options: SessionOptions) -> str:
    """Where to try: "cpu", "cuda" or "tensorrt". Raises MachineError where one is asked for that cannot be here."""
    if options.device == "tensorrt":
        if tensorrt_provider.PROVIDER not in ort.get_available_providers() or not cuda_works():
            raise MachineError(
                "TensorRT was asked for, and there is no GPU with ONNX Runtime's TensorRT build here",
                hint="dlops doctor shows what works; --device cpu runs on the CPU",
            )
        tensorrt_provider.load_libraries()
        return "tensorrt"
    if options.device == "auto":
        return "cuda" if cuda_works() else "cpu"
    if options.device == "cuda" and not cuda_works():
        raise MachineError(
            "CUDA was asked for, and there is no GPU with ONNX Runtime's CUDA build here",
            hint="dlops doctor shows what works; --device cpu runs on the CPU",
        )
    return options.device


def _open(
    model: str | bytes, settings: ort.SessionOptions, device: str, options: SessionOptions, title: str,
    on_tensorrt: Mapping[str, str] = MappingProxyType({}),
) -> _Opened:  # fmt: skip
    """A session on that device. Raises MachineError where another provider is given, CorruptError where none is.

    on_tensorrt: the provider's options.
    """
    provider = _PROVIDERS[device]
    # Without a stream that it is given, ONNX Runtime takes another for each run that is under way at once.
    stream = Stream() if device != "cpu" and options.own_stream else None
    try:
        session = ort.InferenceSession(
            model,
            sess_options=settings,
            providers=_chain(provider, options, stream, on_tensorrt),
            # Its own fallback prints to stdout, and tells nobody where a run then takes place.
            enable_fallback=0,
        )
    except Exception as error:  # ORT raises a class of its own a status code, all direct children of Exception
        if stream is not None:
            stream.close()
        if options.cuda_graph:
            raise MachineError(
                f"{title}: ONNX Runtime cannot run it as a CUDA graph: {first_line(error)}",
                hint="leave --cuda-graph (of a service: DLOPS_CUDA_GRAPHS) out",
            ) from error
        raise CorruptError(f"{title}: ONNX Runtime cannot load it: {first_line(error)}") from error
    used = session.get_providers()[0]
    if used != provider:
        if stream is not None:
            stream.close()
        raise MachineError(
            f"{title}: asked for {provider}, ONNX Runtime gave {used}",
            hint="dlops doctor shows which providers work here; --device cpu runs on the CPU",
        )
    if device == "tensorrt" and (assigned := _assigned(session)) and provider not in assigned:
        if stream is not None:
            stream.close()
        raise MachineError(
            f"{title}: TensorRT was asked for and takes no node of the graph: {', '.join(assigned)} would run it",
            hint="--device cuda",
        )
    return _Opened(session=session, stream=stream)


def _session_options(threads: int, options: SessionOptions, precision: str) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _ERRORS_ONLY
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spin else "0")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if precision in ("int8wo", "fp8"):
        # Else every run widens the weights anew, and ONNX Runtime may turn products of int8 into others, on integers.
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if options.profile_prefix is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options.profile_prefix)
    return settings


def _computed(precision: str, device: str) -> str:
    """What the kernels compute in."""
    match precision:
        case "fp16" if device == "cpu":  # its kernels there cast to fp32 and back
            return "fp32"
        case "int8wo" | "fp8":  # the weights are widened once, when the session is made
            return "fp32"
        case "int8dyn":
            return "int8"
    return precision


def _assigned(session: ort.InferenceSession) -> dict[str, dict[str, int]]:
    """How many nodes of each operator every provider was given, before it fuses them; empty from ORT before 1.24."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    found: dict[str, Counter[str]] = {}
    for group in session.get_provider_graph_assignment_info():
        found.setdefault(group.ep_name, Counter()).update(node.op_type for node in group.get_nodes())
    return {provider: dict(sorted(counts.items())) for provider, counts in found.items()}


def _run_options(*, graph: int | None, wait: bool = True) -> ort.RunOptions:
    """graph: which CUDA graph a run captures or replays. wait: whether the run returns only once all is done."""
    options = ort.RunOptions()
    # What fails is raised; ONNX Runtime would write it to stderr too, a line for each request that a service refuses.
    options.log_severity_level = 4
    if graph is not None:
        options.add_run_config_entry("gpu_graph_id", str(graph))
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _chain(
    provider: str, options: SessionOptions, stream: Stream | None, on_tensorrt: Mapping[str, str]
) -> list[str | tuple[str, dict[str, str]]]:
    if provider == "CPUExecutionProvider":
        return [provider]
    settings = {} if stream is None else {"user_compute_stream": str(stream.handle)}
    # The CPU provider stays behind CUDA for shape operators; the session's first provider is checked above.
    if provider != tensorrt_provider.PROVIDER:
        settings |= {"enable_cuda_graph": "1"} if options.cuda_graph else {}
        return [(provider, settings), "CPUExecutionProvider"]
    graph = {"trt_cuda_graph_enable": "1"} if options.cuda_graph else {}
    # CUDA runs what TensorRT has no form of.
    behind = (_PROVIDERS["cuda"], dict(settings))
    return [(provider, {**settings, **graph, **on_tensorrt}), behind, "CPUExecutionProvider"]


def _buffer(array: Array, device: str) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, device, 0)
