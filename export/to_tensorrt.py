"""A TensorRT engine, built from our ONNX graph for the GPU of this machine, in types that the graph says.

Strongly typed: TensorRT computes in what stands in the graph and chooses nothing narrower. So fp16 is a graph in fp16,
int8 and fp8 are operands of products rounded in a graph whose other arithmetic is fp16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import onnx
import tensorrt as trt

from dlops import cudart
from dlops.console import Bar, progress_bar
from dlops.errors import GateError, MachineError, UsageError, first_line
from dlops.export.formats import Exported, ExportRequest
from dlops.export.plan import STATIC
from dlops.export.precision import MIN_REPAIRED_SHARE, MIN_SHARE, check_precision, rounded_share
from dlops.export.quantize import Notes
from dlops.export.to_onnx import calibrated, fp32_graph, strip, to_half
from dlops.manifest import sha256_of
from dlops.runtimes.tensorrt import Log, check_gpu, made
from dlops.runtimes.tensorrt_provider import profile_shapes
from dlops.signature import Signature
from dlops.sparsity import SEMI_STRUCTURED
from dlops.trust import note_made_here

# Ada, of which there are no convolutions and matrix products in fp8 before.
_FP8_FROM = (8, 9)


def export(request: ExportRequest) -> Exported:
    """Write the engine to `request.into`, and note that it was made here: only such are loaded without trust.

    Raises UsageError where ONNX or TensorRT has no form of the module, or the CPU is asked for, GateError where the
    graph is not in the precision that was asked for, MachineError where there is no GPU, none for fp8, or no engine
    comes of it.
    """
    if request.device == "cpu":
        raise UsageError(f"{request.title}: an engine is built and checked on a GPU", hint="--device cuda")
    gpu = check_gpu(title=request.title)
    capability = cudart.compute_capability(0)
    if request.variant.precision == "fp8" and capability < _FP8_FROM:
        raise MachineError(
            f"{request.title}: fp8 takes compute capability 8.9 or later, and {gpu} has "
            f"{'.'.join(map(str, capability))}",
            hint="tensorrt-int8 is as small; onnx-fp8 shows anywhere what fp8 costs in accuracy",
        )
    graph, notes = engine_graph(request)
    is_sparse = request.variant.sparsity == SEMI_STRUCTURED
    engine, said = build(graph, request.signature, title=request.title, sparse=is_sparse)
    request.into.write_bytes(engine)
    note_made_here(sha256_of(request.into))
    source = None
    if request.variant.sparsity is not None:
        source = request.into.with_suffix(".onnx")
        onnx.save(graph, source)
    built_for: Notes = {
        "tensorrt": str(trt.__version__), "gpu": gpu, "compute_capability": ".".join(map(str, capability)),
    }  # fmt: skip
    return Exported(path=request.into, source=source, notes={**notes, **said, **built_for})


def engine_graph(request: ExportRequest) -> tuple[onnx.ModelProto, Notes]:
    """What the engine is built from, and how it was made. Raises as `export` does, but for TensorRT's own reasons."""
    precision, notes = request.variant.precision, Notes()
    if precision in STATIC:
        ranges = calibrated(request)
        graph = ranges.quantize(excluded=request.excluded)
        notes = {**ranges.notes(graph), "other_arithmetic": "float16"}
        least = MIN_REPAIRED_SHARE if request.excluded else MIN_SHARE
        if (share := rounded_share(graph)) < least:
            raise GateError(
                f"{request.title}: {precision} was asked for, and {share:.0%} of the weights are read in it",
                hint="convolutions and linear layers alone are: take tensorrt-fp16",
            )
    else:
        graph = fp32_graph(request)
    if precision != "fp32":
        graph = to_half(graph, title=request.title)
    if precision not in STATIC:
        check_precision(graph, precision, title=request.title)
    strip(graph)
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"{request.title}: the graph is not valid ONNX: {first_line(error)}") from error
    return graph, notes


def build(graph: onnx.ModelProto, signature: Signature, *, title: str, sparse: bool = False) -> tuple[bytes, Notes]:
    """The serialized engine, for all sizes that the signature allows, and what TensorRT said of it.

    sparse: kernels that skip two weights of four may be chosen, where they are faster. It takes seconds to minutes, in
    a thread of its own, so that Ctrl-C ends it between two steps. Raises UsageError where TensorRT cannot read the
    graph (the operator is named), MachineError where it builds nothing.
    """
    log = Log()
    builder = made(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.SerializeToString()):
        raise UsageError(f"{title}: TensorRT {trt.__version__} cannot take it: {_problems(parser, log)}")
    config = builder.create_builder_config()
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    shapes = profile_shapes(signature)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, sizes["min"], sizes["opt"], sizes["max"])
        if config.add_optimization_profile(profile) < 0:
            raise MachineError(f"{title}: TensorRT takes no engine for these sizes: {log.reason}")
    with _progress(config, title) as progress:
        engine = _in_a_thread(lambda: builder.build_serialized_network(network, config), progress)
    if engine is None:
        raise MachineError(f"{title}: TensorRT {trt.__version__} builds no engine of it: {log.reason}")
    return bytes(engine), _of_sparsity(log.sparsity)


class Progress(trt.IProgressMonitor):  # type: ignore[misc]
    """The steps of the first outermost phase as a bar in per cent; `stop` ends the build at the next step of any.

    Called from TensorRT's threads, several at once, where no signal arrives and nothing may be raised. Outermost phases
    may follow one another; the first is the longest one known.
    """

    def __init__(self, bar: Bar) -> None:
        trt.IProgressMonitor.__init__(self)
        self.stop = False
        self._bar, self._outermost, self._steps, self._told = bar, "", 1, 0
        self._lock = threading.Lock()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            if not parent_phase and not self._outermost:
                self._outermost, self._steps = phase_name, max(1, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            done = min(100, 100 * (step + 1) // self._steps)
            if phase_name == self._outermost and done > self._told:
                self._bar.advance(done - self._told, note=phase_name)
                self._told = done
        return not self.stop

    def phase_finish(self, phase_name: str) -> None:
        """Nothing is told of it: its last step was."""


@contextmanager
def _progress(config: trt.IBuilderConfig, title: str) -> Iterator[Progress]:
    with progress_bar(f"{title}: building", total=100) as bar:
        progress = Progress(bar)
        config.progress_monitor = progress
        yield progress


def _in_a_thread(work: Any, progress: Progress) -> Any:
    pool = ThreadPoolExecutor(1, thread_name_prefix="tensorrt build")
    running = pool.submit(work)
    try:
        return running.result()
    except KeyboardInterrupt:
        progress.stop = True
        raise
    finally:
        # Not before the build has ended.
        pool.shutdown()


def _of_sparsity(said: Sequence[str]) -> Notes:
    """How many layers have weights that kernels could skip, and of how many such a kernel was chosen; empty where
    TensorRT does not say, as a version of other words would not."""
    notes: Notes = {}
    for line in said:
        words, colon, layers = line.partition(":")
        count = len([layer for layer in layers.split(",") if layer.strip()])
        if colon and "eligible" in words:
            notes["sparse_layers_eligible"] = count
        elif colon and "picked" in words:
            notes["sparse_layers_chosen"] = count
    return notes


def _problems(parser: trt.OnnxParser, log: Log) -> str:
    found = [parser.get_error(place) for place in range(parser.num_errors)]
    said = dict.fromkeys(f"{error.node_operator()}: {error.desc()}" for error in found)
    return "; ".join(said)[:500] if said else log.reason
