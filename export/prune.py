"""Structured pruning by MACs: whole channels cut until the asked fraction of the multiply-accumulates is gone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dlops.checkpoint import PruningRecord
from dlops.errors import DlopsError, GateError, UsageError, missing_package
from dlops.export.formats import PRUNING_TOLERANCE
from dlops.export.macs import (
    Coupling,
    check_countable,
    count_macs,
    layer_macs,
    out_channels,
    removed_fraction,
)
from dlops.pruning import apply_pruning

# Kernels work on blocks of channels, 16 of them in fp32 with AVX-512 and 8 with AVX2: a convolution of 22 channels can
# take longer than one of 32. The coarsest blocks that meet the asked fraction are kept.
GRAINS = (16, 8, 1)
_CLOSE_ENOUGH = 0.005
_BISECTIONS = 10
_REFINEMENTS = 60
_MIN_CHANNELS = 2
_DENSE_HINT = "plain layers joined by plain tensor operations can be pruned; export this one dense"

# Rounding aside, what is reckoned from the layers' shapes is what counting gives; beyond this it is not trusted.
_RECKONING = 1e-3

Widths = Mapping[str, int]
Steps = tuple[tuple[str, bool, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """module: cut, in eval mode, not recovered yet. record: how to cut the dense module the same way."""

    module: nn.Module
    record: PruningRecord


def prune(module: nn.Module, *, fraction: float, example: tuple[torch.Tensor, ...], title: str) -> Pruned:
    """A copy of `module` without `fraction` of its MACs, the smallest channels (L2 norm of their group) cut first.

    The layers that make the output keep their width. Channels are cut in proportion everywhere, then by single steps
    until the fraction is met, in blocks of 16 or 8 channels where the layers are wide enough for that. Raises
    UsageError where the structure cannot be pruned, GateError where no widths come within 2 % of the dense MACs.
    """
    search = _Search(module, example, title)
    best = _nearest(search, fraction)
    if abs(best.removed - fraction) > PRUNING_TOLERANCE:
        raise GateError(
            f"{title}: the nearest to {fraction:.0%} of the MACs that can be removed is {best.removed:.1%}",
            hint=f"ask for pruned{round(best.removed * 100):02d}",
        )
    record = PruningRecord(steps=best.steps, macs_removed=best.removed)
    # What a reader of the record will get must be what goes on from here.
    with _refused(title), _third_party_warnings():
        rebuilt = apply_pruning(copy.deepcopy(module), record, example=example)
    _same_structure(best.module, rebuilt, title)
    return Pruned(module=best.module, record=record)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    module: nn.Module
    steps: Steps
    removed: float


class _Search:
    """Cuts copies of one dense module to given widths, and says how many MACs that removes.

    That is reckoned from the layers' shapes, and counted on a cut copy for the widths that are chosen. `measure` makes
    every answer a counted one, for modules whose MACs the shapes do not tell.
    """

    def __init__(self, module: nn.Module, example: tuple[torch.Tensor, ...], title: str) -> None:
        self.title = title
        self._module, self._example = module, example
        check_countable(module, title=title)
        with _refused(title):
            self._shapes = _output_shapes(module, example)
            self._dense_macs = count_macs(module, example)
            self._layer_macs = layer_macs(module, example)
        if not self._layer_macs:
            raise UsageError(f"{title}: no convolution or linear layer in it, so there is nothing to prune")
        self.kept = self._output_layers()
        self.dense_widths = self._group_widths()
        if not self.dense_widths:
            raise UsageError(
                f"{title}: no channel can be removed: each feeds the output directly or is bound by the module's code",
                hint=_DENSE_HINT,
            )
        self._couplings: tuple[Coupling, ...] | None = self._coupled()
        self._found: dict[tuple[int, ...], float] = {}

    def removed(self, widths: Widths) -> float:
        """Fraction of the dense MACs that these widths remove."""
        key = tuple(widths[name] for name in self.dense_widths)
        if key not in self._found:
            if self._couplings is None:
                self._found[key] = self.cut(widths).removed
            else:
                self._found[key] = removed_fraction(
                    {name: dense - widths[name] for name, dense in self.dense_widths.items()},
                    couplings=self._couplings, layers=self._layer_macs, total=self._dense_macs,
                )  # fmt: skip
        return self._found[key]

    def measure(self) -> None:
        """Count on a cut copy from now on: seconds a candidate instead of nothing."""
        self._couplings = None
        self._found.clear()

    def cut(self, widths: Widths) -> _Candidate:
        with _refused(self.title):
            module, steps = self._cut(widths, ignored=self.kept)
            if _output_shapes(module, self._example) != self._shapes:
                raise UsageError(f"{self.title}: pruning would change the shape of the output")
            removed = 1 - count_macs(module, self._example) / self._dense_macs
        return _Candidate(module=module, steps=steps, removed=removed)

    def _cut(self, widths: Widths, *, ignored: frozenset[str]) -> tuple[nn.Module, Steps]:
        torch_pruning = _torch_pruning()
        module = copy.deepcopy(self._module)
        layers = dict(module.named_modules())
        # torch-pruning truncates width * (1 - ratio): half a channel above the wanted width lands on it exactly.
        ratios = {layers[n]: 1 - (w + 0.5) / out_channels(layers[n]) for n, w in widths.items()}
        with _third_party_warnings():
            pruner = torch_pruning.pruner.MetaPruner(
                module, self._example, importance=torch_pruning.importance.MagnitudeImportance(p=2),
                pruning_ratio=0.0, pruning_ratio_dict=ratios, ignored_layers=[layers[name] for name in ignored],
            )  # fmt: skip
            pruner.step()
        history = pruner.DG.pruning_history()
        steps = tuple((name, bool(is_out), tuple(int(i) for i in channels)) for name, is_out, channels in history)
        return module.eval(), steps

    def _output_layers(self) -> frozenset[str]:
        """Names of the layers that make the output: the last to run, else all as wide as an output."""
        # Hooks fire as the layers run, so the names come in the order of the forward pass.
        order = list(self._layer_macs)
        sizes = {size for shape in self._shapes for size in shape[1:]}
        layers = dict(self._module.named_modules())
        reason = ""
        for kept in (frozenset(order[-1:]), frozenset(n for n in order if out_channels(layers[n]) in sizes)):
            halves = {n: max(1, out_channels(layers[n]) // 2) for n in order if n not in kept}
            try:
                with _refused(self.title):
                    module, _ = self._cut(halves, ignored=kept)
                    if _output_shapes(module, self._example) == self._shapes:
                        return kept
            except UsageError as error:  # it cannot be cut, or no longer runs: perhaps the wrong layers were kept
                reason = f" ({error.message.removeprefix(f'{self.title}: ')})"
        raise UsageError(
            f"{self.title}: no way was found to remove channels and keep the output's shape{reason}", hint=_DENSE_HINT
        )

    def _group_widths(self) -> dict[str, int]:
        """Width by layer name, one layer for each group of layers that must be cut together."""
        layers = dict(self._module.named_modules())
        halves = {n: out_channels(layers[n]) // 2 for n in self._layer_macs if n not in self.kept}
        with _refused(self.title):
            _, steps = self._cut({n: w for n, w in halves.items() if w}, ignored=self.kept)
        return {name: out_channels(layers[name]) for name, is_out, _ in steps if is_out}

    def _coupled(self) -> tuple[Coupling, ...]:
        """Which layers lose channels with each group, as torch-pruning's dependency graph has it."""
        torch_pruning = _torch_pruning()
        module = copy.deepcopy(self._module)
        layers = dict(module.named_modules())
        names = {layer: name for name, layer in layers.items()}
        couplings = []
        with _refused(self.title), _third_party_warnings():
            graph = torch_pruning.DependencyGraph().build_dependency(module, example_inputs=self._example)
            for root, dense in self.dense_widths.items():
                cut = graph.get_pruner_of_module(layers[root]).prune_out_channels
                for step, channels in graph.get_pruning_group(layers[root], cut, list(range(dense))):
                    name = names.get(step.target.module)
                    if name in self._layer_macs:
                        is_out = graph.is_out_channel_pruning_fn(step.handler)
                        couplings.append(Coupling(root=root, layer=name, is_out=is_out, each=len(channels) / dense))
        return tuple(couplings)


def grain(dense: int, coarsest: int = GRAINS[0]) -> int:
    """The block that a layer of `dense` channels is cut in: the largest, up to `coarsest`, that it holds twice."""
    return next((size for size in GRAINS if size <= coarsest and dense >= 2 * size), 1)


def rounded_width(dense: int, ratio: float, coarsest: int = GRAINS[0]) -> int:
    """The width left of `dense` channels, whole blocks of its grain."""
    block = grain(dense, coarsest)
    least = block if block > 1 else min(_MIN_CHANNELS, dense)
    return max(least, round(dense * (1 - ratio) / block) * block)


def _nearest(search: _Search, fraction: float) -> _Candidate:
    """The widths in the coarsest blocks that come within the tolerance, else the nearest of all."""
    found: list[_Candidate] = []
    for coarsest in GRAINS:
        widths = _refine(search, _bisect(search, fraction, coarsest), fraction, coarsest)
        candidate = search.cut(widths)
        if abs(candidate.removed - search.removed(widths)) > _RECKONING:
            search.measure()
            widths = _refine(search, _bisect(search, fraction, coarsest), fraction, coarsest)
            candidate = search.cut(widths)
        found.append(candidate)
        if abs(candidate.removed - fraction) <= PRUNING_TOLERANCE:
            return candidate
    return min(found, key=lambda candidate: abs(candidate.removed - fraction))


def _bisect(search: _Search, fraction: float, coarsest: int) -> dict[str, int]:
    low, high = 0.0, 0.98
    best: dict[str, int] = {}
    for _ in range(_BISECTIONS):
        ratio = (low + high) / 2
        widths = {name: rounded_width(dense, ratio, coarsest) for name, dense in search.dense_widths.items()}
        removed = search.removed(widths)
        if not best or abs(removed - fraction) < abs(search.removed(best) - fraction):
            best = widths
        if abs(removed - fraction) <= _CLOSE_ENOUGH:
            break
        low, high = (ratio, high) if removed < fraction else (low, ratio)
    return best


def _refine(search: _Search, best: dict[str, int], fraction: float, coarsest: int) -> dict[str, int]:
    """Single steps of single groups towards the fraction, for as long as they come nearer."""
    for _ in range(_REFINEMENTS):
        gap = search.removed(best) - fraction
        if abs(gap) <= _CLOSE_ENOUGH:
            return best
        improved = best
        for name, dense in search.dense_widths.items():
            step = grain(dense, coarsest)
            width = best[name] + (step if gap > 0 else -step)
            if not min(step, _MIN_CHANNELS) <= width <= dense or width < 1:
                continue
            candidate = {**best, name: width}
            if abs(search.removed(candidate) - fraction) < abs(search.removed(improved) - fraction):
                improved = candidate
        if improved is best:
            return best
        best = improved
    return best


def _output_shapes(module: nn.Module, example: tuple[torch.Tensor, ...]) -> list[tuple[int, ...]]:
    with torch.inference_mode():
        result = module(*example)
    if isinstance(result, torch.Tensor):
        return [tuple(result.shape)]
    values = result.values() if isinstance(result, Mapping) else result
    return [tuple(value.shape) for value in values]


def _same_structure(pruned: nn.Module, rebuilt: nn.Module, title: str) -> None:
    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    if shapes(pruned) != shapes(rebuilt):
        raise UsageError(
            f"{title}: the pruning record does not rebuild the pruned module",
            hint="torch-pruning's history does not cover this module's operators; export it dense",
        )


@contextmanager
def _refused(title: str) -> Iterator[None]:
    """What tracing, cutting or running the module raises comes out as a UsageError that says so."""
    try:
        yield
    except DlopsError:
        raise
    except Exception as error:  # torch-pruning and a person's own forward may raise anything
        lines = str(error).strip().splitlines()
        raise UsageError(
            f"{title}: this structure cannot be pruned: {type(error).__name__}: {lines[0][:300] if lines else ''}",
            hint=_DENSE_HINT,
        ) from error


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError:
        raise missing_package("torch-pruning", extra="export", needed_for="pruning") from None

    return torch_pruning


@contextmanager
def _third_party_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch-pruning names parameters that no layer owns, which it then leaves as they are: what we want.
        warnings.filterwarnings("ignore", category=UserWarning, module="torch_pruning")
        yield
