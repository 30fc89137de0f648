"""Artifacts and the eager module measured on this machine, in turns, each in a fresh process of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dlops.artifact import Artifact
from dlops.bench.analysis import analyse_turns, remarked, shortcomings
from dlops.bench.macs import UncountedError, count_onnx_macs
from dlops.bench.payload import artifact_feeds, check_batch, check_fits
from dlops.bench.pilot import Length, shortfalls
from dlops.bench.processes import Process
from dlops.bench.scenarios import load_of
from dlops.bench.stats import Integers
from dlops.bench.worker import Job, Kind, gpu_of, local_arm, open_module
from dlops.checkpoint import Checkpoint
from dlops.console import progress_bar
from dlops.errors import UsageError
from dlops.report import Boundary, ColdStart, Measurement, Scenario
from dlops.runtimes import Placement, SessionOptions
from dlops.signature import Signature
from dlops.timing import MIN_SAMPLES, Arm, Interleaved, Timed, by_turn, interleave

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource

EAGER, COMPILED = "eager", "torch.compile"
# The longest that a target is warmed up, where its row does not last longer itself.
WARMUP_S = 2.0
_NOTE = (
    "is measured in the process of the run, which alone has the module that was passed in: its peak memory and cold "
    "start are not known"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is to be timed. artifact: None where it is the checkpoint's own module. model: what builds that.

    Only a module, or a function that makes one, given to the Python API keeps a subject in this process.
    """

    target: str
    kind: Kind
    source: Artifact | Checkpoint
    model: ModuleSource | str | None = None

    @property
    def artifact(self) -> Artifact | None:
        return self.source if isinstance(self.source, Artifact) else None

    @property
    def signature(self) -> Signature:
        return self.source.signature

    @property
    def note(self) -> str | None:
        """What a reader must know of how it is measured."""
        return f"{self.target} {_NOTE}" if self.is_local else None

    @property
    def is_local(self) -> bool:
        """Whether only this process can build it."""
        return self.model is not None and not isinstance(self.model, str)

    def job(
        self, *, samples: Artifact | None, batch: int, boundary: Boundary, options: SessionOptions, concurrency: int = 1
    ) -> Job:
        """What a process of its own is told to do."""
        assert self.model is None or isinstance(self.model, str)
        return Job(
            target=self.target,
            kind=self.kind,
            directory=str(self.source.directory.resolve()),
            model=self.model,
            samples=None if samples is None else str(samples.directory.resolve()),
            batch=batch,
            boundary=boundary,
            device=options.device,
            threads=options.threads,
            cuda_graph=options.cuda_graph,
            trust=options.trust,
            concurrency=concurrency,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Under which a row is measured; what is compared is measured under the same.

    scenario: as it was asked for by name, else None. concurrency: threads that call one session at once. processes:
    fresh ones of each target, one after the other.
    """

    batch: int
    boundary: Boundary
    options: SessionOptions
    scenario: Scenario | None = None
    concurrency: int = 1
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A subject that has answered its first calls. cold_start and what it holds: None in this very process.

    gpu: the PCI address of the one that it runs on, None on the CPU and where CUDA does not say.
    """

    subject: Subject
    arm: Arm
    placement: Placement
    cold_start: ColdStart | None = None
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    gpu: str | None = None

    @property
    def target(self) -> str:
        return self.subject.target

    @property
    def artifact(self) -> Artifact | None:
        return self.subject.artifact


def subjects(
    artifacts: Sequence[Artifact], *, checkpoint: Checkpoint | None, model: ModuleSource | str | None, compiled: bool
) -> list[Subject]:
    """All that is to be timed, the eager module first where a checkpoint is given."""
    found: list[Subject] = []
    if checkpoint is not None:
        found.append(Subject(target=EAGER, kind="eager", source=checkpoint, model=model))
        if compiled:
            found.append(Subject(target=COMPILED, kind="compiled", source=checkpoint, model=model))
    names = distinct([artifact.title for artifact in artifacts])
    found += [
        Subject(target=name, kind="artifact", source=artifact) for name, artifact in zip(names, artifacts, strict=True)
    ]
    return found


def check(
    chosen: Sequence[Subject], *, batches: Sequence[int], boundaries: Sequence[Boundary], own_process: str | None = None
) -> None:
    """Raise UsageError for what cannot be asked of these subjects, before any is started.

    own_process: what is asked that takes a process of its own for each, None where nothing does.
    """
    if own_process and (local := next((one for one in chosen if one.is_local), None)):
        raise UsageError(
            f"{local.target}: {own_process} takes a process that builds the module itself",
            hint='name what builds it: "python:package.module:function"',
        )
    samples = first_artifact(chosen)
    for batch in batches:
        for one in chosen:
            check_batch(one.signature, batch, where=one.target)
        feeds = [] if samples is None else artifact_feeds(samples, batch)
        for one in chosen:
            check_fits(feeds, one.signature, where=one.target)
    if "preprocessing" in boundaries and (samples is None or samples.preprocess is None):
        which = "no artifact is measured" if samples is None else f"{samples.title} takes tensors as they are"
        raise UsageError(f"--boundary preprocessing: {which}", hint="--boundary host")


@contextmanager
def started(
    chosen: Sequence[Subject], conditions: Conditions, *, samples: Artifact | None = None, quiet: bool = False
) -> Iterator[list[Started]]:
    """A process for each, started one after the other so that none slows another's start; all ended at the end.

    samples: the artifact whose samples are fed, by default the first of those to be started. quiet: shows no bar.
    Raises what opening or calling one of them raised: MachineError, in one line, where this machine cannot run it.
    """
    samples = samples or first_artifact(chosen)
    with ExitStack() as stack:
        ready: list[Started] = []
        with progress_bar(f"starting {_plural(len(chosen))}", total=len(chosen), shown=not quiet) as bar:
            for subject in chosen:
                start = _start_here if subject.note else _start
                ready.append(start(stack, subject, samples, conditions))
                bar.advance(note=subject.target)
        yield ready


def time_targets(
    ready: Sequence[Started], *, lasting: Length, parts: int = 1, seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> Interleaved:  # fmt: skip
    """All in turns within one run, for each as long as the one takes that takes longest.

    parts: how many runs like this one make a row, each with its part of the time. seed: of the order of turns. Raises
    TimingInterrupted on Ctrl-C, TimingFailedError where one dies in the middle.
    """
    runs = {one.target: one.arm for one in ready}

    def longer(so_far: Interleaved) -> float:
        each_s = so_far.spent_s / len(runs)
        return len(runs) * max(
            lasting.after(run.latencies_ns, turns=run.turns, spent_s=each_s) for run in so_far.runs.values()
        )

    lasting = lasting.part(parts)
    return interleave(
        runs, budget_s=lasting.first_s * len(runs), max_warmup_s=max(WARMUP_S, lasting.first_s),
        min_samples=-(-MIN_SAMPLES // parts), seed=seed, on_progress=on_progress,
        longer=longer if lasting.is_piloted else None,
    )  # fmt: skip


def measurements(
    ready: Sequence[Started], timed: Interleaved, *, conditions: Conditions, baseline: str | None, keys: Sequence[str],
    processes: Integers | None = None, cut_short: str | None = None,
) -> list[Measurement]:  # fmt: skip
    """One row a target, with its speed-up over the baseline from the pairs of turns.

    processes: by round, in which of several processes of each target; None where there was one of each. cut_short: why
    they ended early.
    """
    batch = conditions.batch
    base_key = next((key for key, one in zip(keys, ready, strict=True) if one.target == baseline), None)
    artifacts = [one.artifact for one in ready if one.artifact]
    rows = []
    for key, one in zip(keys, ready, strict=True):
        run = timed.runs[one.target]
        seen = shortcomings(warmed_up=run.warmed_up, warmup_calls=run.warmup_calls, stopped=cut_short)
        figures = analyse_turns(
            run.latencies_ns, run.turns, run.parts_ns, batch=batch, concurrency=conditions.concurrency,
            processes=None if processes is None else processes[run.turns],
            baseline=None if baseline is None else _blocks(timed.runs[baseline], processes),
            observed=(*misplaced(conditions.options, one.placement), *seen),
        )  # fmt: skip
        row = Measurement(
            load=load_of(conditions.scenario, batch=batch, concurrency=conditions.concurrency),
            samples=key,
            paired_with=base_key,
            processes=1 if processes is None else int(processes[-1]) + 1,
            warmup_calls=run.warmup_calls,
            **figures.as_fields(),
            **placed_fields(one, conditions, artifacts),
        )
        spent_s = timed.spent_s / len(ready)
        rows.append(remarked(row, shortfalls(row.latency, spent_s=spent_s, processes=row.processes)))
    return rows


def _blocks(run: Timed, processes: Integers | None) -> list[Integers]:
    """The latencies of each process where there were several, else of each turn."""
    return run.by_turn() if processes is None else by_turn(run.latencies_ns, processes[run.turns])


def placed_fields(one: Started, conditions: Conditions, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """What a row says of its target, whatever the load. artifacts: all that are measured."""
    placement = one.placement
    known = accuracy_fields(one.artifact) if one.artifact else _eager_accuracy(artifacts)
    return {
        "target": one.target, "artifact": one.artifact.slug if one.artifact else None, "runtime": placement.runtime,
        "provider": placement.provider, "device": placement.device, "precision": placement.precision,
        "threads": placement.threads, "boundary": conditions.boundary,
        "model_bytes": one.artifact.model_bytes if one.artifact else None,
        "peak_memory_bytes": one.peak_memory_bytes, "device_memory_bytes": one.device_memory_bytes,
        "cold_start": one.cold_start, "nodes": {name: dict(counts) for name, counts in placement.nodes.items()},
        **known, **_work(one.artifact, conditions.batch), "moved_bytes": _moved(one.artifact, conditions.batch),
    }  # fmt: skip


def _eager_accuracy(artifacts: Sequence[Artifact]) -> dict[str, float | int]:
    """What the artifacts were compared with is the dense checkpoint, run eagerly."""
    accuracy = next((one.accuracy for one in artifacts if one.accuracy), None)
    if accuracy is None:
        return {}
    return {"accuracy": accuracy.reference, "accuracy_samples": accuracy.samples, "drop_points": 0.0}


def _work(artifact: Artifact | None, batch: int) -> dict[str, int | str]:
    """The multiply-accumulates of a call, or why they are not known, as a row's fields."""
    if artifact is None or artifact.variant.format != "onnx":
        return {"uncounted": "only those of ONNX graphs are counted"}
    try:
        return {"macs": count_onnx_macs(artifact.path("model"), batch=batch)}
    except UncountedError as error:
        return {"uncounted": str(error)}


def _moved(artifact: Artifact | None, batch: int) -> int | None:
    """The bytes of weights, inputs and outputs of a call; None where a shape depends on the data, or for a module.

    And where weights are widened once they are loaded: the file does not tell what moves then.
    """
    if artifact is None or artifact.variant.precision in ("int8wo", "fp8"):
        return None
    total = artifact.model_bytes
    for spec in (*artifact.signature.inputs, *artifact.signature.outputs):
        shape = [batch if dim == "batch" else dim for dim in spec.shape]
        if not all(isinstance(dim, int) for dim in shape):
            return None
        total += math.prod(map(int, shape)) * np.dtype(spec.dtype).itemsize
    return total


# What most of a model's time goes into: shapes and indices may well be computed on the CPU beside a GPU.
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "QLinearMatMul", "LSTM", "GRU"})


def misplaced(options: SessionOptions, placement: Placement) -> tuple[str, ...]:
    """What stands against a session that does not run where it was asked to, should its runtime not have refused."""
    asked, ran = options.device, placement.device.partition(":")[0]
    if asked == "tensorrt" and placement.provider.lower().startswith("tensorrt"):
        asked = "cuda"
    if asked not in ("auto", ran):
        return (f"wrong provider: asked for {asked}, ran on {placement.provider} ({placement.device})",)
    if ran != "cuda":
        return ()
    on_cpu = placement.nodes.get("CPUExecutionProvider", {})
    products = [f"{count} {operator}" for operator, count in on_cpu.items() if operator in _PRODUCTS]
    return (f"wrong provider: on {placement.device}, and {', '.join(products)} on the CPU",) if products else ()


def accuracy_fields(artifact: Artifact) -> dict[str, float | int]:
    """The accuracy that export recorded, as a row's fields; none where it recorded none."""
    accuracy = artifact.accuracy
    if accuracy is None:
        return {}
    return {
        "accuracy": accuracy.value, "accuracy_samples": accuracy.samples, "drop_points": accuracy.drop_points,
        "drop_low": accuracy.drop_low, "drop_high": accuracy.drop_high, "flips": accuracy.flips,
    }  # fmt: skip


def _start(stack: ExitStack, subject: Subject, samples: Artifact | None, conditions: Conditions) -> Started:
    job = subject.job(
        samples=samples, batch=conditions.batch, boundary=conditions.boundary, options=conditions.options,
        concurrency=conditions.concurrency,
    )  # fmt: skip
    process = stack.enter_context(Process(job))
    ready = process.ready()
    return Started(
        subject=subject, arm=process, placement=ready.placement, cold_start=ready.cold_start,
        peak_memory_bytes=ready.peak_memory_bytes, device_memory_bytes=ready.device_memory_bytes, gpu=ready.gpu,
    )  # fmt: skip


def _start_here(stack: ExitStack, subject: Subject, samples: Artifact | None, conditions: Conditions) -> Started:
    assert isinstance(subject.source, Checkpoint)
    assert not isinstance(subject.model, str)
    session = open_module(subject.kind, subject.source, subject.model, conditions.options)
    stack.callback(session.close)
    arm = local_arm(
        subject.target, session, samples=samples, batch=conditions.batch, boundary=conditions.boundary,
        concurrency=conditions.concurrency,
    )  # fmt: skip
    return Started(subject=subject, arm=arm, placement=session.placement, gpu=gpu_of(session.placement))


def first_artifact(chosen: Sequence[Subject]) -> Artifact | None:
    """The same are fed to all: the first artifact's, or none where only the module is measured."""
    return next((one.artifact for one in chosen if one.artifact is not None), None)


def _plural(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def distinct(titles: Sequence[str]) -> list[str]:
    """The titles, a repeated one numbered: measuring one artifact twice shows what chance alone does."""
    seen: dict[str, int] = {}
    names = []
    for title in titles:
        seen[title] = seen.get(title, 0) + 1
        names.append(title if seen[title] == 1 else f"{title}#{seen[title]}")
    return names
