"""A quantized model that loses too much: return its worst layers to fp32, as few as pass the gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dlops.artifact import FloatLayer, Repair
from dlops.console import say
from dlops.errors import GateError, LossError
from dlops.export.layers import LayerError, Ranking

# With more than this fraction of its layers in fp32, an "int8" or "fp8" model is another one than was asked for.
MAX_FLOAT_SHARE = 0.5
_NAMED = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired(Generic[T]):
    """result: what the passing attempt gave."""

    result: T
    record: Repair


def repair_layers(
    attempt: Callable[[tuple[str, ...]], T], *, refusal: LossError, ranking: Ranking, slug: str
) -> Repaired[T]:
    """The attempt with the fewest of the worst layers in fp32 that passes, as far as tries go.

    attempt: exports with those nodes of the graph left in fp32 and asks the gates; it raises LossError where too much
    is lost, another GateError where the file is not what was asked for any more. refusal: what the attempt with all
    layers quantized raised. Raises LossError naming the layers that were tried where none passes.
    """
    search = _Search(attempt=attempt, ranking=ranking, slug=slug)
    limit = max(1, int(MAX_FLOAT_SHARE * len(ranking.layers)))
    found = fewest(limit, search.ask)
    tries = search.tries + 1
    if found is None:
        raise _hopeless(refusal, search, ranking, limit=limit)
    count, result = found
    layers = ranking.layers[:count]
    say(f"{slug}: {count} of {len(ranking.layers)} layers stay in fp32: {_named(layers)}")
    return Repaired(
        result=result,
        record=Repair(
            because=refusal.message,
            layers=tuple(
                FloatLayer(
                    name=error.layer.name, operator=error.layer.operator, weights=error.layer.weights,
                    alone_db=error.alone_db, share=error.share,
                )
                for error in layers
            ),
            of=len(ranking.layers),
            float_share=sum(error.layer.weights for error in layers) / max(1, ranking.weights),
            tries=tries,
        ),
    )  # fmt: skip


def fewest(limit: int, ask: Callable[[int], T]) -> tuple[int, T] | None:
    """The smallest number from 1 to `limit` that `ask` was found to accept, and its answer; None where there is none.

    ask raises LossError where the number is too small, another GateError where it is too large. Numbers are doubled
    until one is not too small, then the gap below is halved: 2 log2(limit) questions at most.
    """
    low, high, best = 0, limit + 1, None
    number = 1
    while high - low > 1:
        try:
            best = number, ask(number)
        except LossError:
            low = number
        except GateError:
            high = number
        else:
            high = number
        number = min(2 * number, limit) if high > limit else (low + high) // 2
    return best


@dataclass(slots=True, kw_only=True)
class _Search(Generic[T]):
    attempt: Callable[[tuple[str, ...]], T]
    ranking: Ranking
    slug: str
    tries: int = 0
    asked: list[int] = field(default_factory=list)
    last: GateError | None = None

    def reason(self, error: GateError) -> str:
        return error.message.removeprefix(f"{self.ranking.title}: ")

    def ask(self, count: int) -> T:
        nodes = tuple(name for error in self.ranking.layers[:count] for name in error.layer.nodes)
        self.tries += 1
        self.asked.append(count)
        try:
            result = self.attempt(nodes)
        except GateError as error:
            say(f"{self.slug}: the worst {count} in fp32: {self.reason(error)}")
            if self.last is None or count >= max(self.asked):
                self.last = error
            raise
        say(f"{self.slug}: the worst {count} in fp32: passes")
        return result


def _hopeless(refusal: LossError, search: _Search[T], ranking: Ranking, *, limit: int) -> LossError:
    most = max(search.asked)
    assert search.last is not None
    return LossError(
        f"{refusal.message}. Its worst layers in fp32 did not help: {', '.join(map(str, sorted(search.asked)))} of "
        f"{len(ranking.layers)} were tried, {limit} at most ({_named(ranking.layers[:most])}); "
        f"with {most}: {search.reason(search.last)}",
        hint=f"{refusal.hint}; dlops export --explain {search.slug} shows every layer's error",
    )


def _named(layers: tuple[LayerError, ...]) -> str:
    names = [
        f"{error.layer.name} {'exact' if error.alone_db is None else f'{error.alone_db:.1f} dB'}"
        for error in layers[:_NAMED]
    ]
    return ", ".join(names) + (f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else "")
