"""Where a target's time goes: each is run once more, in a fresh process under its runtime's profiler.

Run as `python -m dlops.bench.profile JOB TRACE` in the child.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlops.artifact import Artifact, open_artifact
from dlops.bench import traces
from dlops.bench.inprocess import Subject, subjects
from dlops.bench.payload import artifact_feeds, random_feed
from dlops.bench.results import Measured, MeasureInterrupted, trace_role
from dlops.bench.worker import Job, open_job
from dlops.checkpoint import Checkpoint
from dlops.console import progress_bar, say
from dlops.errors import DlopsError, MachineError, UsageError
from dlops.report import Profile
from dlops.runtimes.session import Placement, Session, SessionOptions
from dlops.signature import Feed, Signature

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource

_TIMEOUT_S = 600
# The first calls size arenas and choose kernels.
_WARMUP_CALLS = 3
# A first recording, of a few calls, shows how many events one makes.
_FIRST_CALLS = 5
_ENOUGH_S = 1.0
# torch takes a second or two to make a table of so many.
_MAX_EVENTS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """trace: the file of all events, gzipped."""

    profile: Profile
    trace: bytes


def add_profiles(
    measured: Measured,
    artifacts: Sequence[Artifact],
    *,
    checkpoint: Checkpoint | None,
    options: SessionOptions | Sequence[SessionOptions],
    model: ModuleSource | str | None = None,
    compiled: bool = False,
) -> Measured:
    """The same with a profile of every target that was measured in process, at every batch and under all options.

    model, compiled: as for `measure`. What has no profiler is noted. A target that fails is too, and the report is
    partial. On Ctrl-C raises
    MeasureInterrupted with the profiles made until then.
    """
    batches = sorted({row.load.batch for row in measured.measurements if row.boundary != "network"})
    chosen = subjects(artifacts, checkpoint=checkpoint, model=model, compiled=compiled)
    under = [options] if isinstance(options, SessionOptions) else list(options)
    profiles = list(measured.report.profiles)
    files = dict(measured.traces)
    notes = list(measured.report.notes)
    if local := [one.target for one in chosen if one.is_local]:
        are = "is" if len(local) == 1 else "are"
        notes.append(f"{' and '.join(local)} {are} not profiled: a fresh process cannot build a module passed in")
    chosen = [one for one in chosen if not one.is_local]
    for subject in chosen:
        if _form(subject) not in _RECORDERS:
            notes.append(f"{subject.target} is not profiled: there is no profiler for {_form(subject)} here")
    chosen = [one for one in chosen if _form(one) in _RECORDERS]

    def result(*, partial: bool) -> Measured:
        report = measured.report.model_copy(
            update={"profiles": tuple(profiles), "notes": tuple(notes), "partial": measured.partial or partial}
        )
        return replace(measured, report=report, traces=files)

    partial = False
    say("profiling: every target once more, in a process of its own")
    try:
        with progress_bar("profile", total=len(under) * len(batches) * len(chosen)) as bar:
            for one, batch in itertools.product(under, batches):
                for target, found in profile_each(chosen, batch=batch, options=one):
                    if isinstance(found, DlopsError):
                        say(str(found))
                        notes.append(f"{target} at batch {batch} has no profile: {found.message}")
                        partial = True
                    else:
                        role = trace_role(len(files))
                        profiles.append(found.profile.model_copy(update={"trace": role}))
                        files[role] = found.trace
                    bar.advance(note=target)
    except KeyboardInterrupt:
        notes.append("interrupted before every target was profiled")
        raise MeasureInterrupted(result(partial=True)) from None
    return result(partial=partial)


def profile_each(
    chosen: Sequence[Subject], *, batch: int, options: SessionOptions
) -> Iterator[tuple[str, Profiled | DlopsError]]:
    """Each target with its profile or with what went wrong; one process at a time, fed what the timing feeds.

    An artifact that is named twice is profiled once.
    """
    feed = next((one.artifact for one in chosen if one.artifact is not None), None)
    seen = set()
    for one in chosen:
        what = (one.kind, one.source.directory.resolve())
        if what not in seen:
            seen.add(what)
            yield one.target, _profile(one, feed=feed, batch=batch, options=options)


def _profile(subject: Subject, *, feed: Artifact | None, batch: int, options: SessionOptions) -> Profiled | DlopsError:
    where = subject.source.directory
    if _form(subject) not in _RECORDERS:
        return UsageError(
            f"{subject.target}: no profiler for {_form(subject)} here", hint=f"{', '.join(_RECORDERS)} have one"
        )
    with tempfile.TemporaryDirectory(prefix="dlops-profile-") as folder:
        trace = Path(folder) / "trace.json.gz"
        job = subject.job(samples=feed, batch=batch, boundary="host", options=options)
        command = [sys.executable, "-P", "-m", "dlops.bench.profile", job.model_dump_json(), str(trace)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return MachineError(f"{where}: not loaded and profiled within {_TIMEOUT_S} s")
        if child.returncode != 0:
            last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
            return MachineError(f"{where}: the process that profiles it failed: {last}")
        # A runtime may have written to stdout too; the child's answer is its last line.
        fields = json.loads(child.stdout.strip().splitlines()[-1])
        slug = subject.artifact.slug if subject.artifact else None
        profile = Profile(target=subject.target, artifact=slug, batch=batch, trace=trace_role(0), **fields)
        return Profiled(profile=profile, trace=trace.read_bytes())


def record_enough(record: Callable[[int], traces.Recording]) -> traces.Recording:
    """Of a second of calls, or of as many as make 20,000 events; record(most) records for a second at most.

    A model so large that a few calls reach a limit is recorded once.
    """
    first = record(_FIRST_CALLS)
    most = _MAX_EVENTS * first.calls // max(len(first.events), 1)
    return first if most < 2 * first.calls or first.total_ns >= _ENOUGH_S * 1e9 else record(most)


def _record_onnx(job: Job, trace: Path) -> tuple[traces.Recording, Placement]:
    from dlops.runtimes.onnxruntime import open_session

    artifact = open_artifact(job.directory)
    feeds = _feeds(job, artifact.signature)
    placements: list[Placement] = []

    # A session records from its start and only once.
    def record(most: int) -> traces.Recording:
        prefix = trace.with_name("onnxruntime")
        options = SessionOptions(device=job.device, threads=job.threads, profile_prefix=prefix)
        session = open_session(artifact, options)
        placements.append(session.placement)
        _warm_up(session, feeds)
        for feed in _for_a_while(feeds, most):
            session.run(feed)
        path = session.end_profile()
        session.close()
        events = json.loads(path.read_bytes())
        path.unlink()
        return traces.read_onnxruntime(events, warmup=_WARMUP_CALLS)

    return record_enough(record), placements[-1]


def _record_torch(job: Job, trace: Path) -> tuple[traces.Recording, Placement]:
    from torch.profiler import ProfilerActivity, profile, record_function

    session, _ = open_job(job)
    feeds = _feeds(job, session.signature)
    device = session.placement.device
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.startswith("cuda") else [])
    path = trace.with_name("torch.json")
    _warm_up(session, feeds)

    def record(most: int) -> traces.Recording:
        with profile(activities=activities) as profiler:
            for feed in _for_a_while(feeds, most):
                with record_function(traces.CALL):
                    session.run(feed)
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())
        path.unlink()
        return traces.read_torch(profiler.key_averages(), events, device=device)

    return record_enough(record), session.placement


# Kinds of jobs, and formats of artifacts.
_RECORDERS = {
    "eager": _record_torch, "compiled": _record_torch, "torchscript": _record_torch, "torchexport": _record_torch,
    "onnx": _record_onnx,
}  # fmt: skip


def _form(subject: Subject) -> str:
    """By which it is recorded."""
    return subject.artifact.variant.format if subject.artifact else subject.kind


def _feeds(job: Job, signature: Signature) -> list[Feed]:
    if job.samples is None:
        return [random_feed(signature, job.batch)]
    return artifact_feeds(open_artifact(job.samples), job.batch)


def _warm_up(session: Session, feeds: Sequence[Feed]) -> None:
    for feed in itertools.islice(itertools.cycle(feeds), _WARMUP_CALLS):
        session.run(feed)


def _for_a_while(feeds: Sequence[Feed], most: int) -> Iterator[Feed]:
    """The feeds in turn, until a second has passed or there were `most`; one at least."""
    end = time.monotonic() + _ENOUGH_S
    for feed in itertools.islice(itertools.cycle(feeds), most):
        yield feed
        if time.monotonic() >= end:
            return


def main(text: str, trace: Path) -> None:
    job = Job.model_validate_json(text)
    form = open_artifact(job.directory).variant.format if job.kind == "artifact" else job.kind
    recording, placement = _RECORDERS[form](job, trace)
    content, kept = traces.compress_trace(recording)
    trace.write_bytes(content)
    counted = traces.profile_fields(recording, provider=placement.provider)
    fields = counted | {
        "operators": [one.model_dump() for one in counted["operators"]],
        "providers": {name: one.model_dump() for name, one in counted["providers"].items()},
        "runtime": placement.runtime, "provider": placement.provider, "device": placement.device,
        "threads": placement.threads, "traced_calls": kept,
    }  # fmt: skip
    print(json.dumps(fields))


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except DlopsError as failure:
        sys.exit(str(failure))
