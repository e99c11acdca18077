"""What one optimizer step does to the weights: parameter groups, learning rate, loss, average."""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gcvit_edge.training.settings import TrainSettings

Groups = Sequence[dict[str, Any]]


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """All trainable parameters; those of less than two dimensions, and position biases, without weight decay."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or name.endswith("relative_position_bias_table") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate_factor(step: int, *, steps: int, warmup: float) -> float:
    """Fraction of the peak at optimizer step `step` (from 0): linear over `warmup` of all steps, then half a cosine to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))


def ema_decay(updates: int, limit: float) -> float:
    """Decay of the average after `updates` updates: few weights are forgotten slowly only once there are many."""
    return min(limit, (1 + updates) / (10 + updates))


def objective(logits: Tensor, classes: Tensor, taught: Tensor | None, settings: TrainSettings) -> Tensor:
    """Mean loss. logits, and the teacher's `taught` if the settings have distillation, (B, classes) float32; classes (B,)."""
    loss = F.cross_entropy(logits, classes, label_smoothing=settings.label_smoothing)
    distillation = settings.distillation
    if distillation is None or taught is None:
        return loss
    heat, weight = distillation.temperature, distillation.weight
    student, teacher = F.log_softmax(logits / heat, 1), F.log_softmax(taught / heat, 1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * heat**2
    return (1 - weight) * loss + weight * divergence


def average(averaged: Any, current: Any, updates: int, *, limit: float) -> None:
    """Moves lists of averaged tensors towards the current ones, after `updates` times before."""
    get_ema_multi_avg_fn(ema_decay(updates, limit))(averaged, current, updates)
