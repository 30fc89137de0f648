"""Recovery after pruning: the dense module teaches the pruned or sparse one on the calibration samples."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dlops.console import progress_bar
from dlops.export.formats import BUDGET_S
from dlops.signature import Array, Feed, Signature
from dlops.sparsity import zero_out
from dlops.tensors import to_tensor

# At a constant rate until the held-out loss no longer falls; at most so many epochs with the annealing that follows.
EPOCHS = 60
# A small calibration set makes short epochs: fewer steps than this would not move the weights.
MIN_STEPS = 600
MAX_STEPS = 6_000
# A plateau: so many epochs without the best loss falling by this fraction. Annealing takes half as long as went before.
PATIENCE = 2
MIN_GAIN = 0.1
ANNEALING = 0.5
BATCH = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
# Hinton et al. 2015: softened logits carry what the teacher knows of the other classes.
TEMPERATURE = 4.0
# Share of the hard targets in the loss; the teacher has seen far more data than the calibration samples.
TARGET_WEIGHT = 0.1
HELD_OUT = 0.15
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


Ended = Literal["plateau", "epochs", "budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """loss_before, loss_after: distillation loss on calibration samples that were held out of the recovery.

    ended: why the constant rate did: the loss no longer fell, all epochs were over, or the time was.
    """

    samples: int
    epochs: int
    loss_before: float
    loss_after: float
    ended: Ended


def recover(
    student: nn.Module, teacher: nn.Module, *, signature: Signature, feed: Feed, targets: Array | None, seed: int,
    device: torch.device, title: str, masks: Mapping[str, torch.Tensor] | None = None, budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> Recovery:  # fmt: skip
    """Train `student` in place to answer as `teacher` does, on the calibration samples; it ends in eval mode.

    masks: of weights by their name; what is false there is zero after every step. budget_s: seconds by `clock` after
    which it is to be over: annealing begins in time, and one epoch is always trained and one annealed.

    Loss: KL divergence of softened logits (the first output), the mean squared error of any other, and cross entropy
    to integer targets. Batch norms are re-estimated first, and once more at the end where that is better. A held-out
    part of the samples decides when to anneal, and the best weights are kept. Same seed and CPU threads: same weights,
    unless the budget was reached.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        data = _Data(feed, targets, signature, seed=seed, device=device)
        student.to(device)
        taught = copy.deepcopy(teacher).to(device).eval()
        with torch.no_grad():
            answers = _forward_all(taught, data)
        reestimate_batch_norms(student, data.tensors)
        before = _held_out_loss(student, answers, data)
        course = _Course(per_epoch=math.ceil(len(data.training) / BATCH), budget_s=budget_s, clock=clock)
        after = _train(
            student, answers, data, course, before=before, title=title,
            masks={name: mask.to(device) for name, mask in (masks or {}).items()},
        )  # fmt: skip
        student.cpu().eval()
    return Recovery(
        samples=len(data.training), epochs=course.epoch, loss_before=before, loss_after=after, ended=course.ended
    )


def reestimate_batch_norms(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Running means and variances anew, as plain averages over the samples: pruned channels shifted them."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BATCH_NORMS)]
    momenta = [layer.momentum for layer in norms]
    module.eval()
    for layer in norms:
        layer.reset_running_stats()
        # None: the cumulative average. Only these layers train, so dropout stays off.
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        for indices in _batches(torch.arange(len(inputs[0])), smallest=2):
            module(*(tensor[indices.to(tensor.device)] for tensor in inputs))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    module.eval()


class _Data:
    def __init__(
        self, feed: Feed, targets: Array | None, signature: Signature, *, seed: int, device: torch.device
    ) -> None:
        self.tensors = tuple(to_tensor(np.array(feed[spec.name])).to(device) for spec in signature.inputs)
        usable = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu"
        self.targets = torch.from_numpy(np.asarray(targets, np.int64)).to(device) if usable else None
        self.order = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(self.tensors[0]), generator=self.order)
        held = max(1, round(HELD_OUT * len(shuffled)))
        self.held_out, self.training = shuffled[:held], shuffled[held:]


class _Course:
    """The learning rate over the steps: up within an epoch, constant, and down to nothing once annealing has begun."""

    def __init__(self, *, per_epoch: int, budget_s: float, clock: Callable[[], float]) -> None:
        self._per_epoch = max(1, per_epoch)
        self._most = max(2, min(max(EPOCHS, math.ceil(MIN_STEPS / self._per_epoch)), MAX_STEPS // self._per_epoch))
        self._least = math.ceil(MIN_STEPS / (1 + ANNEALING) / self._per_epoch)
        self._clock, self._began, self._budget_s = clock, clock(), budget_s
        self._gained_in, self._to_beat = 0, math.inf
        self._annealing_from: int | None = None
        self.epoch, self._step, self.last = 0, 0, self._most
        self.ended: Ended = "epochs"

    @property
    def is_over(self) -> bool:
        return self.epoch >= self.last

    def next_rate(self) -> float:
        """Of the next step."""
        self._step += 1
        if self._annealing_from is None:
            return LEARNING_RATE * min(1.0, self._step / self._per_epoch)
        steps = (self.last - self._annealing_from) * self._per_epoch
        return LEARNING_RATE * max(0.0, 1 - (self._step - self._annealing_from * self._per_epoch) / steps)

    def end_epoch(self, held_out_loss: float) -> None:
        """Begin annealing where the loss stays, or where epochs or seconds are left for no more than that."""
        self.epoch += 1
        if held_out_loss < self._to_beat * (1 - MIN_GAIN):
            self._to_beat, self._gained_in = held_out_loss, self.epoch
        if self._annealing_from is not None:
            return
        annealing = max(1, math.ceil(ANNEALING * self.epoch))
        elapsed = self._clock() - self._began
        each = elapsed / self.epoch
        # Another epoch makes annealing longer by a fraction of one.
        if elapsed + (1 + annealing + ANNEALING) * each > self._budget_s:
            fitting = int((self._budget_s - elapsed) / each) if each else annealing
            self._anneal(min(annealing, max(1, fitting)), "budget")
        elif self.epoch >= self._least and self.epoch - self._gained_in >= PATIENCE:
            self._anneal(annealing, "plateau")
        elif self.epoch + annealing + 1 > self._most:
            self._anneal(max(1, self._most - self.epoch), "epochs")

    def _anneal(self, epochs: int, ended: Ended) -> None:
        self._annealing_from, self.last, self.ended = self.epoch, self.epoch + epochs, ended


def _train(
    student: nn.Module, answers: tuple[torch.Tensor, ...], data: _Data, course: _Course, *, before: float, title: str,
    masks: Mapping[str, torch.Tensor],
) -> float:  # fmt: skip
    """Returns the held-out loss of the weights kept."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, best_state = before, copy.deepcopy(student.state_dict())
    with progress_bar(title, total=course.last) as bar:
        while not course.is_over:
            student.train()
            shuffled = data.training[torch.randperm(len(data.training), generator=data.order)]
            for indices in _batches(shuffled, smallest=2):
                rate = course.next_rate()
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = _loss(student, answers, data, indices)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                zero_out(student, masks)
            held = _held_out_loss(student, answers, data)
            course.end_epoch(held)
            if held < best:
                best, best_state = held, copy.deepcopy(student.state_dict())
            bar.advance(note=f"at most {course.last}; held-out loss {held:.4f}, best {best:.4f}")
    student.load_state_dict(best_state)
    reestimate_batch_norms(student, tuple(tensor[data.training.to(tensor.device)] for tensor in data.tensors))
    settled = _held_out_loss(student, answers, data)
    if settled < best:
        return settled
    student.load_state_dict(best_state)
    return best


def _loss(student: nn.Module, answers: tuple[torch.Tensor, ...], data: _Data, indices: torch.Tensor) -> torch.Tensor:
    logits, *others = _forward(student, data, indices)
    on = indices.to(logits.device)
    wanted = answers[0][on]
    if logits.ndim == 2 and logits.shape[1] > 1:
        soft = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, dim=1), F.log_softmax(wanted / TEMPERATURE, dim=1),
            reduction="batchmean", log_target=True,
        ) * TEMPERATURE**2  # fmt: skip
        if data.targets is not None:
            soft = (1 - TARGET_WEIGHT) * soft + TARGET_WEIGHT * F.cross_entropy(logits, data.targets[on])
    else:
        soft = F.mse_loss(logits, wanted)
    for got, answer in zip(others, answers[1:], strict=True):
        soft = soft + F.mse_loss(got, answer[on])
    return soft


@torch.no_grad()
def _held_out_loss(student: nn.Module, answers: tuple[torch.Tensor, ...], data: _Data) -> float:
    student.eval()
    total = 0.0
    for indices in _batches(data.held_out, smallest=1):
        total += float(_loss(student, answers, data, indices)) * len(indices)
    return total / len(data.held_out)


def _forward(module: nn.Module, data: _Data, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result = module(*(tensor[indices.to(tensor.device)] for tensor in data.tensors))
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(result.values()) if isinstance(result, Mapping) else tuple(result)


def _forward_all(module: nn.Module, data: _Data) -> tuple[torch.Tensor, ...]:
    parts = [_forward(module, data, indices) for indices in _batches(torch.arange(len(data.tensors[0])), smallest=1)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _batches(indices: torch.Tensor, *, smallest: int) -> Iterator[torch.Tensor]:
    """In order; a last batch below `smallest` joins the one before it (batch norm cannot train on one sample)."""
    chunks = list(torch.split(indices, BATCH))
    if len(chunks) > 1 and len(chunks[-1]) < smallest:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    yield from chunks
