"""The loop, pass by pass: in which mode, precision and noise a network computes, what is evaluated, and when a run is saved."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_checks import interrupt_after

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.training import loop
from gcvit_edge.training.images import LabelledImages, Samples
from gcvit_edge.training.loop import Epoch, accuracy
from gcvit_edge.training.settings import TrainSettings

Runner = Callable[..., tuple[nn.Module, list[Epoch]]]
STEPS = 5  # of an epoch of 40 images


class Probe(nn.Module):
    """A linear that notes of every forward pass its mode, its type and the noise that it draws."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3 * 32 * 32, 4)
        self.modes: list[bool] = []
        self.types: list[torch.dtype] = []
        self.noise: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images.flatten(1))
        self.modes.append(self.training)
        self.types.append(logits.dtype)
        self.noise.append(float(torch.rand(())))
        return logits


@pytest.fixture
def warns_only() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_network_is_trained_in_the_mode_for_it(run: Runner) -> None:
    model = Probe().eval()
    run(model, settings={"epochs": 1})
    assert model.modes == [True] * STEPS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_are_of_the_precision_that_is_asked_for(precision: str, run: Runner, colours: LabelledImages) -> None:
    model, teacher = Probe(), Probe(1)
    settings = {"epochs": 1, "precision": precision, "distillation": {}}
    averaged, _ = run(model, settings=settings, teacher=teacher, evaluation=colours)
    assert {*model.types, *teacher.types, *averaged.types} == {getattr(torch, precision)}  # type: ignore[misc]


def test_every_pass_has_noise_of_its_own(run: Runner) -> None:
    model = Probe()
    run(model, settings={"epochs": 2, "micro_batch": 4})
    assert len(set(model.noise)) == len(model.noise) == 2 * STEPS * 2


def test_a_resumed_run_draws_the_noise_of_an_uninterrupted_one(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)  # every step
    settings = {"epochs": 2, "micro_batch": 4}
    whole, first, second = Probe(), Probe(), Probe()
    run(whole, "whole", settings=settings)
    interrupt_after(first, 2 * 7)  # before the eighth of 10 steps, the third of the second epoch
    with pytest.raises(KeyboardInterrupt):
        run(first, "parted", settings=settings)
    run(second, "parted", settings=settings, resume=True)
    assert first.noise[: 2 * 7] + second.noise == whole.noise


def test_each_process_draws_its_share_of_the_noise_of_one(run: Runner, colours: LabelledImages, tmp_path: Path) -> None:
    settings = {"epochs": 1, "batch_size": 16, "micro_batch": 4}
    whole = Probe()
    run(whole, "one", settings=settings)
    shares = []
    for index in range(2):
        # one of two processes, of which the other is not there: its gradients and totals are missed, its noise is not
        process = SimpleNamespace(
            device=torch.device("cpu"), num_processes=2, process_index=index, is_main_process=index == 0, prepare_model=lambda model: model,
            no_sync=lambda _: nullcontext(), backward=lambda loss: loss.backward(), reduce=lambda total: total,
        )  # fmt: skip
        model = Probe()
        loop.fit(model, colours, TrainSettings(**settings), process, state=tmp_path / f"{index}")  # type: ignore[arg-type]
        shares.append(np.reshape(model.noise, (2, 2)))  # steps, passes
    assert np.concatenate(shares, 1).tolist() == np.reshape(whole.noise, (2, 4)).tolist()


def test_noise_does_not_depend_on_what_augmentation_drew(run: Runner) -> None:
    """Images that are read in this process draw from the same generator; those that other processes read do not."""
    plain, augmented = Probe(), Probe()
    run(plain, "plain", settings={"epochs": 1, "augmentation": None})
    run(augmented, "augmented", settings={"epochs": 1, "augmentation": {"rand_augment": 5}})
    assert augmented.noise == plain.noise


def test_other_seeds_give_other_noise(run: Runner) -> None:
    first, second = Probe(), Probe()
    run(first, "seed0", settings={"epochs": 1, "seed": 0})
    run(second, "seed1", settings={"epochs": 1, "seed": 1})
    assert not set(first.noise) & set(second.noise)


def test_the_average_is_of_the_weights_behind_a_step(run: Runner) -> None:
    model = Probe()
    averaged, _ = run(model, settings={"epochs": 1, "ema_decay": 0.0})  # the last weights
    torch.testing.assert_close(averaged.linear.weight, model.linear.weight, rtol=0, atol=0)  # type: ignore[union-attr]


def test_the_average_is_what_is_evaluated_and_given_back(run: Runner, colours: LabelledImages) -> None:
    model = Probe()
    averaged, _ = run(model, settings={"epochs": 2}, evaluation=colours)
    assert len(model.modes) == 2 * STEPS  # none for the evaluation
    assert averaged.modes == [False] * 4  # 40 images in parts of 32, twice
    assert not averaged.training


def test_a_teacher_does_not_train(run: Runner) -> None:
    teacher = Probe(1).train()
    run(Probe(), settings={"epochs": 1, "distillation": {}}, teacher=teacher)
    assert teacher.modes == [False] * STEPS


def test_a_run_goes_on_with_its_own_teacher(run: Runner) -> None:
    settings = {"epochs": 1, "distillation": {}}
    run(Probe(), settings=settings, teacher=Probe(1))
    run(Probe(), settings=settings, teacher=Probe(1), resume=True)
    with pytest.raises(UserError, match="is of another run: teacher was "):
        run(Probe(), settings=settings, teacher=Probe(2), resume=True)


def test_weights_that_the_last_step_breaks_are_not_saved(run: Runner, tmp_path: Path) -> None:
    """They are in no loss."""
    model = Probe()

    def break_the_last(gradient: Tensor) -> Tensor:
        return gradient * float("inf") if len(model.modes) == STEPS else gradient

    model.linear.bias.register_hook(break_the_last)
    with pytest.raises(CheckFailed, match="loss or weights are not finite any more"):
        run(model, settings={"epochs": 1, "clip_norm": None})
    assert not (tmp_path / "state").exists()


def test_a_run_is_saved_when_a_minute_has_passed_since_it_was(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which a step takes 25 s."""
    model, saved = Probe(), []
    monkeypatch.setattr(loop, "perf_counter", lambda: time.perf_counter() + 25 * len(model.modes))
    monkeypatch.setattr(loop, "write_state", lambda file, identity, content: saved.append(content["step"]))
    run(model, settings={"epochs": 1, "batch_size": 4})
    assert saved == [3, 6, 9, 10]


def test_processes_share_out_what_is_evaluated(colours: LabelledImages) -> None:
    model = Probe()
    images = torch.stack([Samples(colours)[index][0] for index in range(len(colours))])
    answers = model(images).argmax(1).numpy()
    data = replace(colours, classes=np.where(np.arange(len(answers)) % 2, (answers + 1) % 4, answers))  # every second is wrong
    shares: list[Any] = [
        SimpleNamespace(device=torch.device("cpu"), process_index=index, num_processes=2, reduce=lambda total: total) for index in range(2)
    ]
    assert [accuracy(model, data, TrainSettings(), share) for share in shares] == [0.5, 0.0]  # type: ignore[call-arg]


@pytest.mark.usefixtures("warns_only")
def test_operators_are_as_the_program_had_them_afterwards(run: Runner) -> None:
    run(Probe(), settings={"epochs": 1})
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
