"""What a search asked and found, as JSON: one line an event in Optuna's journal, nothing pickled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from dlops.errors import CorruptError, missing_package
from dlops.manifest import Record, Sha256, explain_validation
from dlops.report import Interval

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as Proposal

Quantile = Literal["p50", "p90", "p99"]
_RECORD, _QUESTION = "dlops", "question"


class Question(Record):
    """What a search is for; trials of one question say nothing of another.

    max_drop: percentage points of the metric that may be lost. limit_ns: of the quantile, at `batch`. cpu, gpus: times
    on another machine are others. variants, threads: to choose from.
    """

    checkpoint: str
    checkpoint_sha256: Sha256
    max_drop: float
    quantile: Quantile
    limit_ns: float = Field(gt=0)
    batch: int = Field(ge=1)
    device: str
    cpu: str
    cores: int
    gpus: tuple[str, ...] = ()
    dlops_version: str
    variants: tuple[str, ...]
    threads: tuple[int | None, ...]

    def is_like(self, other: Question) -> bool:
        """Whether they differ in nothing but what there is to choose from."""
        return self == other.model_copy(update={"variants": self.variants, "threads": self.threads})


class Setting(Record):
    """One point of the search: a variant, and how it is run. threads: null on a GPU. cuda_graph: calls replay one."""

    variant: str
    threads: int | None
    cuda_graph: bool = False

    @property
    def text(self) -> str:
        parts = [self.variant]
        if self.threads is not None:
            parts.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join([*parts, "CUDA graph"] if self.cuda_graph else parts)


class Trial(Record):
    """One setting that was tried. reason: why it was refused, null where it was measured.

    tail, median: of the call's latency in nanoseconds, null where the sample could not certify it; speedup: over the
    baseline, from paired turns. accuracy: a fraction, with the drop in points and its 95 % interval.
    """

    setting: Setting
    reason: str | None = None
    tail: Interval | None = None
    median: Interval | None = None
    speedup: Interval | None = None
    provider: str | None = None
    steady: bool = True
    model_bytes: int | None = None
    metric: str | None = None
    accuracy: float | None = None
    drop_points: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None

    @property
    def is_measured(self) -> bool:
        return self.tail is not None


class Search:
    """A study of Optuna under one question, in a journal file that a later call goes on with.

    settings: all there are. TPE proposes the next from those measured, the first ones being one of each variant. What
    was tried of them when there were others to choose from is taken over.
    """

    def __init__(self, journal: Path, question: Question, settings: Sequence[Setting], *, seed: int) -> None:
        optuna = _optuna()
        journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
            self._study = optuna.create_study(
                study_name=question.model_dump_json(), storage=storage, load_if_exists=True,
                directions=["minimize", "maximize"], sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=6),
            )  # fmt: skip
            self.trials = _recorded(self._study.get_trials(deepcopy=False))
            earlier = _of_others(storage, question)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise CorruptError(
                f"{journal}: not a journal of `dlops optimize`: {error}", hint="name another folder with --report"
            ) from None
        self._settings = list(settings)
        # A parameter of the study only where there is a choice.
        self._graphs = any(setting.cuda_graph for setting in settings)
        self._random = random.Random(seed)  # noqa: S311 - which of the rest comes next, not a secret
        self._first = _one_of_each(self._settings)
        self._open: Proposal | None = None
        for trial in earlier:
            if trial.setting in self.untried:
                self.note(trial)
        self.resumed = len(self.trials)

    @property
    def untried(self) -> list[Setting]:
        tried = {trial.setting for trial in self.trials}
        return [setting for setting in self._settings if setting not in tried]

    def ask(self) -> Setting | None:
        """The next setting, none twice; None where all were tried."""
        untried = self.untried
        if not untried:
            return None
        waiting = next((setting for setting in self._first if setting in untried), None)
        self._open = self._propose(waiting)
        setting = self._setting(self._open)
        if setting not in untried:
            self._drop()
            self._open = self._propose(self._random.choice(untried))
            setting = self._setting(self._open)
        return setting

    def tell(self, trial: Trial) -> None:
        """What came of the setting that was asked for last."""
        assert self._open is not None
        optuna = _optuna()
        self._open.set_user_attr(_RECORD, trial.model_dump(mode="json"))
        if trial.tail is None or trial.accuracy is None:
            self._study.tell(self._open, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._open, [trial.tail.value, trial.accuracy])
        self._open = None
        self.trials.append(trial)

    def note(self, trial: Trial) -> None:
        """What is known of a setting without having asked for it."""
        self._open = self._propose(trial.setting)
        self.tell(trial)

    def abandon(self) -> None:
        """The setting that was asked for last was not tried to its end: it may be asked for again."""
        if self._open is not None:
            self._drop()

    def _drop(self) -> None:
        assert self._open is not None
        self._study.tell(self._open, state=_optuna().trial.TrialState.FAIL)
        self._open = None

    def _propose(self, fixed: Setting | None) -> Proposal:
        trial: Proposal
        if fixed is None:
            trial = self._study.ask()
            return trial
        graph = {"cuda_graph": fixed.cuda_graph} if self._graphs else {}
        self._study.enqueue_trial({"variant": fixed.variant, "threads": fixed.threads, **graph})
        while self._setting(trial := self._study.ask()) != fixed:
            # One that an interrupted search had put in the queue.
            self._study.tell(trial, state=_optuna().trial.TrialState.FAIL)
        return trial

    def _setting(self, trial: Proposal) -> Setting:
        variants = list(dict.fromkeys(setting.variant for setting in self._settings))
        threads = list(dict.fromkeys(setting.threads for setting in self._settings))
        return Setting(
            variant=str(trial.suggest_categorical("variant", variants)),
            threads=trial.suggest_categorical("threads", threads),
            cuda_graph=bool(self._graphs and trial.suggest_categorical("cuda_graph", [False, True])),
        )


def _recorded(trials: Sequence[FrozenTrial]) -> list[Trial]:
    found: dict[Setting, Trial] = {}
    for trial in trials:
        record: Any = trial.user_attrs.get(_RECORD)
        if record is None:
            continue
        try:
            one = Trial.model_validate(record)
        except ValidationError as error:
            raise ValueError(explain_validation(error)) from None
        found[one.setting] = one
    return list(found.values())


def _of_others(storage: Any, question: Question) -> list[Trial]:
    """The trials in the journal of the same question with other settings to choose from."""
    found = []
    for study in _optuna().study.get_all_study_names(storage):
        try:
            asked = Question.model_validate_json(study)
        except ValidationError:
            continue  # of another version
        if asked != question and asked.is_like(question):
            found += _recorded(_optuna().load_study(study_name=study, storage=storage).get_trials(deepcopy=False))
    return found


def _one_of_each(settings: Sequence[Setting]) -> list[Setting]:
    """Every variant that is not pruned, with the most threads: what precisions cost shows first."""
    most: dict[str, Setting] = {}
    for setting in settings:
        kept = most.get(setting.variant)
        if kept is None or (setting.threads or 0) > (kept.threads or 0):
            most[setting.variant] = setting
    return [setting for variant, setting in most.items() if "pruned" not in variant]


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ModuleNotFoundError:
        raise missing_package("optuna", needed_for="dlops optimize", extra="optimize") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
