"""Learning rate, average, loss and parameter groups, against their definitions."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.training.optimization import average, ema_decay, learning_rate_factor, objective, parameter_groups
from gcvit_edge.training.settings import Distillation, TrainSettings


def test_the_learning_rate_rises_then_falls_as_a_cosine() -> None:
    factors = [learning_rate_factor(step, steps=100, warmup=0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert learning_rate_factor(0, steps=1, warmup=0.0) == 1.0
    assert learning_rate_factor(3, steps=3, warmup=1.0) == 1.0  # all warm-up


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    averaged = AveragedModel(model, multi_avg_fn=lambda a, c, n: average(a, c, n, limit=0.5))
    values, expected = [1.0, 3.0, -2.0, 10.0, 4.0, 4.0, 0.0, 6.0, 1.0, 2.0, 3.0], 0.0
    for updates, value in enumerate(values):
        with torch.no_grad():
            model.weight.fill_(value)
        averaged.update_parameters(model)
        decay = min(0.5, (1 + updates) / (10 + updates)) if updates else 0.0
        expected = decay * expected + (1 - decay) * value
        assert averaged.module.weight.item() == pytest.approx(expected)
    assert [ema_decay(n, 0.5) for n in (0, 1, 8, 1000)] == pytest.approx([0.1, 2 / 11, 0.5, 0.5])
    assert ema_decay(5, 0.0) == 0.0


def test_loss_without_a_teacher_is_the_smoothed_cross_entropy() -> None:
    logits, classes = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    smooth = 0.9 * F.one_hot(classes, 3) + 0.1 / 3
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective(logits, classes, None, TrainSettings(label_smoothing=0.1)), expected)


def test_loss_with_a_teacher() -> None:
    logits, taught, classes = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    settings = TrainSettings(label_smoothing=0, distillation=Distillation(temperature=2.0, weight=0.75))
    p, q = (taught / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean() * 4
    torch.testing.assert_close(objective(logits, classes, taught, settings), 0.25 * F.cross_entropy(logits, classes) + 0.75 * divergence)
    alone = TrainSettings(distillation=Distillation())
    assert objective(taught, classes, taught, alone).item() == pytest.approx(0, abs=1e-6)


def test_what_has_weight_decay(make_model: Callable[..., GCViT]) -> None:
    model = make_model()
    model.stem.requires_grad_(False)
    decayed, others = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with_decay, without = ({names[id(p)] for p in group["params"]} for group in (decayed, others))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert {"head.fc.weight", "stages.0.blocks.0.attn.qkv.weight"} <= with_decay
    assert {"head.fc.bias", "stages.3.norm.weight", "stages.0.blocks.0.attn.rel_pos.relative_position_bias_table"} <= without
    assert len(with_decay) + len(without) == len(names) - sum(name.startswith("stem.") for name in names.values())
