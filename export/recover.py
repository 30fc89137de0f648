"""Recovery after pruning: the dense module teaches the pruned one on the calibration samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dlops.console import progress_bar
from dlops.signature import Array, Feed, Signature

EPOCHS = 60
# A small calibration set makes short epochs: fewer steps than this would not move the weights.
MIN_STEPS = 600
MAX_STEPS = 6_000
BATCH = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
# Hinton et al. 2015: softened logits carry what the teacher knows of the other classes.
TEMPERATURE = 4.0
# Share of the hard targets in the loss; the teacher has seen far more data than the calibration samples.
TARGET_WEIGHT = 0.1
HELD_OUT = 0.15
PATIENCE = 20
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """loss_before, loss_after: distillation loss on calibration samples that were held out of the recovery."""

    samples: int
    epochs: int
    loss_before: float
    loss_after: float


def recover(
    student: nn.Module, teacher: nn.Module, *, signature: Signature, feed: Feed, targets: Array | None, seed: int,
    device: torch.device, title: str,
) -> Recovery:  # fmt: skip
    """Train `student` in place to answer as `teacher` does, on the calibration samples; it ends in eval mode.

    Loss: KL divergence of softened logits (the first output), the mean squared error of any other, and cross entropy
    to integer targets. Batch norms are re-estimated first. A held-out part of the samples decides when to stop, and
    the best weights are kept. Same seed and CPU threads: same weights.
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
        epochs, after = _train(student, answers, data, before=before, title=title)
        student.cpu().eval()
    return Recovery(samples=len(data.training), epochs=epochs, loss_before=before, loss_after=after)


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
        self.tensors = tuple(torch.from_numpy(np.array(feed[spec.name])).to(device) for spec in signature.inputs)
        usable = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu"
        self.targets = torch.from_numpy(np.asarray(targets, np.int64)).to(device) if usable else None
        self.order = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(self.tensors[0]), generator=self.order)
        held = max(1, round(HELD_OUT * len(shuffled)))
        self.held_out, self.training = shuffled[:held], shuffled[held:]


def _train(
    student: nn.Module, answers: tuple[torch.Tensor, ...], data: _Data, *, before: float, title: str
) -> tuple[int, float]:
    """Returns the epochs run and the held-out loss of the weights kept."""
    per_epoch = max(1, math.ceil(len(data.training) / BATCH))
    epochs = max(1, min(max(EPOCHS, math.ceil(MIN_STEPS / per_epoch)), MAX_STEPS // per_epoch))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=epochs * per_epoch + 1, pct_start=0.1
    )
    best, best_state, best_epoch = before, copy.deepcopy(student.state_dict()), 0
    done = 0
    with progress_bar(title, total=epochs) as bar:
        for epoch in range(1, epochs + 1):
            student.train()
            shuffled = data.training[torch.randperm(len(data.training), generator=data.order)]
            for indices in _batches(shuffled, smallest=2):
                loss = _loss(student, answers, data, indices)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            done = epoch
            held = _held_out_loss(student, answers, data)
            if held < best:
                best, best_state, best_epoch = held, copy.deepcopy(student.state_dict()), epoch
            bar.advance(note=f"held-out loss {held:.4f}, best {best:.4f}")
            if epoch - best_epoch >= PATIENCE:
                break
    student.load_state_dict(best_state)
    return done, best


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
