"""Scores of a classifier whose every answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dlops.train.evaluation import evaluate


def test_scores_of_known_answers_by_class() -> None:
    # Answered 0, 0, 0, 1 where 0, 0, 1, 1 is right; class 2 is neither there nor found.
    logits = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [2.0, 0, 0], [0, 2.0, 0]])
    targets = torch.tensor([0, 0, 1, 1])
    module = nn.Identity().train()
    batches = [(logits[:3], targets[:3]), (logits[3:], targets[3:])]
    scores = evaluate(module, batches, classes=3, device=torch.device("cpu"))
    assert (scores.accuracy, scores.samples) == (0.75, 4)
    assert scores.precision == pytest.approx((2 / 3, 1.0, 0.0))
    assert scores.recall == pytest.approx((1.0, 0.5, 0.0))
    assert scores.f1 == pytest.approx((0.8, 2 / 3, 0.0))
    assert scores.loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)))
    assert module.training
