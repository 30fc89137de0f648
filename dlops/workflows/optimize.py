"""`dlops optimize`: which variant, run how, keeps an accuracy and a latency; every trial is exported and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import AwareDatetime

from dlops import catalog
from dlops.artifact import Artifact, Variant
from dlops.bench.results import merge, save_report
from dlops.bench.run import Measured, measure
from dlops.checkpoint import Checkpoint
from dlops.console import say
from dlops.directory import write_json
from dlops.environment import available_cores, describe_environment
from dlops.errors import DlopsError, GateError, LossError, MachineError, UsageError
from dlops.export.origin import checkpoint_digest
from dlops.export.pipeline import export_each
from dlops.export.plan import AVAILABLE, plan_variants
from dlops.manifest import Record
from dlops.report import Interval, Measurement, Objective
from dlops.runtimes.session import Device
from dlops.version import __version__
from dlops.workflows.trials import Question, Search, Setting, Trial

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource

SPARSITIES = ("dense", "pruned30", "pruned50", "pruned70")
JOURNAL, RESULT, PAGE, FINALS = "trials.jsonl", "optimize.json", "report.html", "finals"
# The longest that each of the two targets of a trial is timed; less where p50 and p99 are known before.
TRIAL_S, FINAL_S = 8.0, 20.0
# The best of many noisy measurements is a flattered one: so many are measured once more, side by side.
FINALISTS = 3
# Between processes of one artifact the median differs by a per cent or two, which one process of each cannot tell.
FINAL_PROCESSES = 6
_INTERRUPTED = 130


class Result(Record):
    """What a search came to. trials: all that were tried under the question, of earlier calls too.

    finals: the best of them measured again, which decides; empty where the search was cut short (partial). winner: the
    fastest that certainly keeps the objective, null where none does. nearest: then the one that came nearest.
    """

    kind: Literal["optimize"] = "optimize"
    created: AwareDatetime
    command: tuple[str, ...]
    question: Question
    trials: tuple[Trial, ...]
    finals: tuple[Trial, ...]
    winner: Setting | None
    nearest: Setting | None
    because: str
    left: int
    partial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """artifact: the winner, null where nothing keeps the objective. directory: of the report. status: the exit's."""

    result: Result
    artifact: Artifact | None
    directory: Path
    status: int


def optimize(
    checkpoint: Checkpoint,
    *,
    objective: Objective,
    max_drop: float = 1.0,
    device: Device = "auto",
    budget_s: float = 600.0,
    batch: int = 1,
    variants: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    out: Path | str = "artifacts",
    report: Path | str | None = None,
    model: ModuleSource | None = None,
    seed: int = 0,
    command: Sequence[str] = (),
) -> Outcome:
    """Search variants and thread counts for what keeps `objective` and loses at most `max_drop` points.

    budget_s: no trial begins after that; measuring the best again comes on top. variants: slugs to choose from, by
    default every one that can be made, dense and pruned. threads: by default powers of two and all cores. report: a
    folder; the search goes on there where an earlier one of the same question was stopped. Ctrl-C keeps what was found.
    Raises UsageError where there is nothing to search.
    """
    environment = describe_environment()
    directory = Path(report or Path("reports", f"optimize-{checkpoint.name}"))
    on_gpu = device in ("cuda", "tensorrt") or (device == "auto" and bool(environment.gpus))
    slugs = _slugs(checkpoint, variants, max_drop, on_gpu=on_gpu)
    counts = _threads(threads, on_gpu=on_gpu)
    question = Question(
        checkpoint=checkpoint.name, checkpoint_sha256=checkpoint_digest(checkpoint), max_drop=max_drop,
        quantile=objective.quantile, limit_ns=objective.limit_ns, batch=batch, device=device, cpu=environment.cpu,
        cores=environment.cores, gpus=environment.gpus if device != "cpu" else (), dlops_version=__version__,
        variants=tuple(slugs), threads=tuple(counts),
    )  # fmt: skip
    settings = [
        Setting(variant=slug, threads=count, cuda_graph=graph)
        for slug in slugs
        for count in counts
        for graph in ((False, True) if on_gpu else (False,))
    ]
    search = Search(directory / JOURNAL, question, settings, seed=seed)
    say(f"{len(slugs)} variants, {len(settings)} settings to choose from; {search.resumed} were tried before")
    runs = _Runs(
        question,
        exports=_Exports(checkpoint, slugs, out=Path(out), max_drop=max_drop, device=device, model=model),
        command=tuple(command),
    )
    finals: list[Trial] = []
    partial = False
    try:
        _search(search, runs, deadline=time.monotonic() + budget_s)
        finals = _finals(search, runs, directory)
    except KeyboardInterrupt:
        search.abandon()
        partial = True
        say("interrupted: what was found so far is kept, and the same command goes on from here")
    result = _conclude(question, search, finals, partial=partial, command=tuple(command))
    _write(result, directory)
    artifact = None if result.winner is None else runs.exports.get(result.winner.variant)
    status = _INTERRUPTED if partial else 0 if result.winner else GateError.exit_status
    return Outcome(
        result=result, artifact=artifact if isinstance(artifact, Artifact) else None, directory=directory, status=status
    )


class _Exports:
    """Artifacts by slug, each exported once; the variants of one structure together, which share what is costly."""

    def __init__(
        self, checkpoint: Checkpoint, slugs: Sequence[str], *, out: Path, max_drop: float, device: Device,
        model: ModuleSource | None,
    ) -> None:  # fmt: skip
        self._made: dict[str, Artifact | DlopsError] = {}
        self._groups: dict[str | None, list[str]] = {}
        for slug in slugs:
            self._groups.setdefault(Variant.parse(slug).sparsity, []).append(slug)

        def export(group: Sequence[str]) -> Iterator[tuple[Variant, Artifact | DlopsError]]:
            return export_each(
                checkpoint, variants=group, out=out, model=model, max_drop=max_drop, device=device, command=()
            )

        self._export: Callable[[Sequence[str]], Iterator[tuple[Variant, Artifact | DlopsError]]] = export
        self._running: dict[str | None, Iterator[tuple[Variant, Artifact | DlopsError]]] = {}

    def get(self, slug: str) -> Artifact | DlopsError:
        sparsity = Variant.parse(slug).sparsity
        if sparsity not in self._running:
            # The one that is wanted first, so that a short search does not wait for the others.
            self._running[sparsity] = self._export(sorted(self._groups[sparsity], key=lambda one: one != slug))
        while slug not in self._made:
            variant, made = next(self._running[sparsity])
            self._made[variant.slug] = made
        return self._made[slug]


class _Runs:
    """Measurements under one question, each in turns with the same baseline: the first variant that passed."""

    def __init__(self, question: Question, *, exports: _Exports, command: tuple[str, ...]) -> None:
        self.question, self.exports, self._command = question, exports, command
        self._baseline: Artifact | None = None

    def measure(
        self, artifacts: Sequence[Artifact], setting: Setting, *, longest_s: float, processes: int = 1
    ) -> Measured:
        """All of them run as the setting says."""
        device = cast("Device", self.question.device)
        return measure(
            artifacts, batch=[self.question.batch], threads=None if setting.threads is None else [setting.threads],
            device=device, cuda_graph=setting.cuda_graph, processes=processes, max_duration_s=longest_s,
            command=self._command,
        )  # fmt: skip

    def try_out(self, setting: Setting) -> Trial:
        """Export where need be, and measure."""
        made = self.exports.get(setting.variant)
        if isinstance(made, DlopsError):
            return Trial(setting=setting, reason=made.message)
        if self._baseline is None:
            self._baseline = made
        paired = [made] if made.slug == self._baseline.slug else [self._baseline, made]
        try:
            measured = self.measure(paired, setting, longest_s=TRIAL_S)
        except MachineError as error:
            # One that this machine cannot run says nothing against the others.
            return Trial(setting=setting, reason=f"it could not be measured: {error.message}")
        return self.trial_of(setting, measured, made)

    def trial_of(self, setting: Setting, measured: Measured, artifact: Artifact) -> Trial:
        row = next((row for row in measured.measurements if row.artifact == setting.variant), None)
        if row is None:
            return Trial(setting=setting, reason="it failed while it was measured")
        found = artifact.accuracy
        return Trial(
            setting=setting, tail=_tail(row, self.question), median=row.latency.p50_ns, speedup=row.speedup,
            provider=row.provider, steady=row.verdict.steady, model_bytes=row.model_bytes,
            metric=found.metric if found else None, accuracy=found.value if found else None,
            drop_points=found.drop_points if found else None, drop_low=found.drop_low if found else None,
            drop_high=found.drop_high if found else None,
            reason=None if _tail(row, self.question) else f"too few calls to be sure of {self.question.quantile}",
        )  # fmt: skip


def _search(search: Search, runs: _Runs, *, deadline: float) -> None:
    while time.monotonic() < deadline:
        setting = search.ask()
        if setting is None:
            say("every setting was tried")
            return
        left = len(search.untried)
        say(f"\n[{len(search.trials) + 1}] {setting.text} ({left} left, {max(0, deadline - time.monotonic()):.0f} s)")
        trial = runs.try_out(setting)
        search.tell(trial)
        if trial.tail is not None:
            say(f"{setting.text}: {runs.question.quantile} {_ms(trial.tail)}")
        else:
            _rule_out(search, runs, trial)
    say("the budget is spent")


def _rule_out(search: Search, runs: _Runs, refused: Trial) -> None:
    """What a refusal settles: the same variant on other threads, and where fp32 lost too much, what cuts off more."""
    made = runs.exports.get(refused.setting.variant)
    if not isinstance(made, DlopsError):
        return
    variant = Variant.parse(refused.setting.variant)
    for setting in search.untried:
        other = Variant.parse(setting.variant)
        if other == variant:
            search.note(refused.model_copy(update={"setting": setting}))
        elif (
            variant.precision == "fp32"
            and isinstance(made, LossError)
            and other.pruned_fraction > variant.pruned_fraction
        ):
            search.note(Trial(setting=setting, reason=f"not tried: {variant.slug} lost too much already"))


def _finals(search: Search, runs: _Runs, directory: Path) -> list[Trial]:
    """The fastest measured once more, those that run alike side by side, over processes; their report is kept."""
    best = sorted((trial for trial in search.trials if trial.tail), key=_speed)[:FINALISTS]
    if not best:
        return []
    say(f"\nmeasuring again, side by side: {'; '.join(trial.setting.text for trial in best)}")
    found: list[Trial] = []
    measured: list[Measured] = []
    for run_as in dict.fromkeys((trial.setting.threads, trial.setting.cuda_graph) for trial in best):
        together = [one.setting for one in best if (one.setting.threads, one.setting.cuda_graph) == run_as]
        artifacts = [made for one in together if isinstance(made := runs.exports.get(one.variant), Artifact)]
        part = runs.measure(artifacts, together[0], longest_s=FINAL_S, processes=FINAL_PROCESSES)
        measured.append(part)
        for setting in together:
            artifact = next(one for one in artifacts if one.slug == setting.variant)
            found.append(runs.trial_of(setting, part, artifact))
    save_report(merge(*measured), directory / FINALS)
    return found


def _conclude(
    question: Question, search: Search, finals: Sequence[Trial], *, partial: bool, command: tuple[str, ...]
) -> Result:
    again = sorted((trial for trial in finals if trial.tail), key=_speed)
    known = again or sorted((trial for trial in search.trials if trial.tail), key=_speed)
    # Of those measured again alone: the best of the trials is a flattered one.
    sure = [one for one in again if one.tail and one.tail.high is not None and one.tail.high <= question.limit_ns]
    winner = sure[0].setting if sure and not partial else None
    nearest = known[0] if known else None
    limit = f"{question.quantile} {question.limit_ns / 1e6:g} ms"
    if winner is not None:
        because = f"{winner.text}: {question.quantile} {_ms(sure[0].tail)} keeps {limit}"
    elif nearest is None:
        reasons = "; ".join(
            dict.fromkeys(f"{one.setting.variant}: {one.reason}" for one in search.trials if one.reason)
        )
        because = f"nothing could be measured{f': {reasons}' if reasons else ''}"
    elif partial:
        because = f"cut short; the best so far is {nearest.setting.text}: {question.quantile} {_ms(nearest.tail)}"
    elif nearest.tail is not None and nearest.tail.value <= question.limit_ns:
        because = f"nothing certainly keeps {limit}; nearest is {nearest.setting.text}: {_ms(nearest.tail)}, too unsure"
    else:
        because = f"nothing keeps {limit}; nearest is {nearest.setting.text}: {_ms(nearest.tail)}"
    return Result(
        created=datetime.now(UTC), command=command, question=question, trials=tuple(search.trials),
        finals=tuple(finals), winner=winner, nearest=None if winner or nearest is None else nearest.setting,
        because=because, left=len(search.untried), partial=partial,
    )  # fmt: skip


def _write(result: Result, directory: Path) -> None:
    from dlops.workflows.optimize_page import render_page

    write_json(directory / RESULT, result.model_dump_json(indent=2) + "\n")
    write_json(directory / PAGE, render_page(result))


def _slugs(checkpoint: Checkpoint, asked: Sequence[str] | None, max_drop: float, *, on_gpu: bool) -> list[str]:
    """What to choose from: what was asked for, else all that can be made, and run to advantage, here."""
    if asked is not None:
        return [one.slug for one in plan_variants(asked, checkpoint, max_drop=max_drop, strict=False)]
    offered = [
        "-".join([form, precision, *([] if sparsity == "dense" else [sparsity])])
        for sparsity in SPARSITIES
        for form in sorted(_formats(on_gpu=on_gpu), key=lambda form: form != "onnx")
        for precision in AVAILABLE[form]
        if on_gpu or precision != "fp8"
    ]
    if not on_gpu:
        say("left out: onnx-fp8, which a CPU computes in fp32")
    kept = []
    for slug in offered:
        try:
            plan_variants([slug], checkpoint, max_drop=max_drop, strict=False)
        except UsageError as error:
            say(f"left out: {error.message}")
        else:
            kept.append(slug)
    if not kept:
        raise UsageError(f"{checkpoint.name}: no variant of it can be made, so there is nothing to search")
    return kept


def _formats(*, on_gpu: bool) -> list[str]:
    """Those whose packages are installed, and whose device is there."""
    found = []
    for form in AVAILABLE:
        try:
            if form == "tensorrt" and not on_gpu:
                raise MachineError("tensorrt: it takes an NVIDIA GPU, and none is used here")
            catalog.resolve(catalog.FORMATS, "format", form)
            catalog.resolve(catalog.RUNTIMES, "runtime", form)
        except MachineError as error:
            say(f"left out: {error.message}")
        else:
            found.append(form)
    return found


def _threads(asked: Sequence[int] | None, *, on_gpu: bool) -> list[int | None]:
    if on_gpu:
        if asked:
            raise UsageError(
                "threads are for the CPU, and this would run on a GPU", hint="--device cpu, or leave them out"
            )
        return [None]
    cores = available_cores()
    counts = asked or [2**power for power in range(cores.bit_length()) if 2**power < cores] + [cores]
    return list(dict.fromkeys(counts))


def _speed(trial: Trial) -> float:
    return trial.tail.value if trial.tail else math.inf


def _tail(row: Measurement, question: Question) -> Interval | None:
    found: Interval | None = getattr(row.latency, f"{question.quantile}_ns")
    return found


def _ms(interval: Interval | None) -> str:
    if interval is None:
        return "unknown"
    ends = [f"{end / 1e6:.3g}" if end is not None else "?" for end in (interval.low, interval.high)]
    return f"{interval.value / 1e6:.3g} ms ({' to '.join(ends)})"
