"""The loop: it learns, from labels and from a teacher; it resumes bit for bit; batches may be split."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import free_port
from torch import Tensor, nn
from training_checks import assert_same, interrupt_after

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.training import optimization
from gcvit_edge.training.devices import make_accelerator
from gcvit_edge.training.images import LabelledImages, Samples
from gcvit_edge.training.loop import Epoch, accuracy
from gcvit_edge.training.optimization import learning_rate_factor
from gcvit_edge.training.settings import TrainSettings

Runner = Callable[..., tuple[nn.Module, list[Epoch]]]
Maker = Callable[..., GCViT]


def logits(model: nn.Module, data: LabelledImages) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.stack([Samples(data)[index][0] for index in range(len(data))]))


def test_the_loss_falls_and_the_average_classifies(small_model: Maker, run: Runner, colours: LabelledImages) -> None:
    trained, history = run(small_model(drop_path=0.1), settings={"epochs": 6}, evaluation=colours)
    assert len(history) == 6
    assert history[-1].loss < 0.6 * history[0].loss
    assert history[-1].accuracy > 0.9
    assert not trained.training
    right = (logits(trained, colours).argmax(1).numpy() == colours.classes).mean()
    assert history[-1].evaluation == right > 0.9


def test_a_student_learns_from_its_teacher_whatever_the_labels(small_model: Maker, run: Runner, colours: LabelledImages) -> None:
    teacher = run(small_model(), "teacher", settings={"epochs": 6})[0]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wrong = replace(colours, classes=np.roll(colours.classes, 10))
    student, _ = run(small_model(dim=8), settings={"epochs": 12, "distillation": {}}, teacher=teacher, data=wrong)
    agreement = (logits(student, colours).argmax(1) == logits(teacher, colours).argmax(1)).float().mean()
    assert agreement > 0.9
    assert_same(teacher.state_dict(), before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(
    small_model: Maker, run: Runner, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcvit_edge.training.loop.SAVE_SECONDS", 0)  # every step
    settings = {"epochs": 3, "micro_batch": 4, "precision": precision, "augmentation": {"rand_augment": 5}}
    whole, history = run(small_model(drop_path=0.2), "whole", settings=settings)
    model = small_model(drop_path=0.2)
    interrupt_after(model, 2 * 7 + 1)  # in the middle of the eighth of 15 steps, the third of the second epoch
    with pytest.raises(KeyboardInterrupt):
        run(model, "parted", settings=settings)
    assert torch.load(tmp_path / "parted", weights_only=True)["content"]["step"] == 7
    parted, parted_history = run(small_model(dim=16, drop_path=0.2), "parted", settings=settings, resume=True)
    assert_same(torch.load(tmp_path / "parted", weights_only=True), torch.load(tmp_path / "whole", weights_only=True))
    assert_same(parted.state_dict(), whole.state_dict())
    assert [(e.loss, e.accuracy) for e in parted_history] == [(e.loss, e.accuracy) for e in history]
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == ["parted"]


RESUMED_BY_TWO = """
import sys
from pathlib import Path
from torch import nn
from training_checks import interrupt_after
from gcvit_edge.data import Labels, Preprocessing, class_indices, find_images
from gcvit_edge.training import loop
from gcvit_edge.training.devices import make_accelerator
from gcvit_edge.training.images import LabelledImages
from gcvit_edge.training.settings import TrainSettings

loop.SAVE_SECONDS = 0  # every step
folder, images = Path(sys.argv[1]), find_images(Path(sys.argv[2]), "training")
labels = Labels.of(sorted(set(images.classes)))
data = LabelledImages(images, class_indices(images, labels), Preprocessing(size=(32, 32), resize=36))
accelerator = make_accelerator("cpu")

def fit(state, passes, resume):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4, bias=False))
    nn.init.zeros_(model[1].weight)
    interrupt_after(model, passes)
    try:
        return loop.fit(model, data, TrainSettings(batch_size=8, epochs=1), accelerator, state=folder / state, resume=resume)[1]
    except KeyboardInterrupt:
        accelerator.wait_for_everyone()

(whole,) = fit("whole", 100, False)
fit("parted", 3, False)  # of five steps
(parted,) = fit("parted", 100, True)
assert (parted.loss, parted.accuracy) == (whole.loss, whole.accuracy), (parted, whole)
accelerator.end_training()
"""


def test_what_two_processes_saw_before_an_interruption_counts(tmp_path: Path, colours: LabelledImages) -> None:
    command = [sys.executable, "-c", RESUMED_BY_TWO, str(tmp_path), str(colours.images.root)]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launched |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    running = [
        subprocess.Popen(command, env=os.environ | launched | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()


def test_other_seeds_give_other_weights(small_model: Maker, run: Runner) -> None:
    first, second = (run(small_model(), f"seed{seed}", settings={"epochs": 1, "seed": seed})[0] for seed in (0, 1))
    assert not torch.equal(first.head.fc.weight, second.head.fc.weight)  # type: ignore[union-attr, arg-type]


def test_a_split_batch_gives_the_gradient_of_the_whole(small_model: Maker, run: Runner, colours: LabelledImages) -> None:
    (whole, history), (split, split_history) = (
        run(small_model(), f"micro{micro}", settings={"micro_batch": micro, "clip_norm": 0.5}) for micro in (8, 2)
    )
    assert [e.loss for e in split_history] == pytest.approx([e.loss for e in history], abs=1e-4)
    # not weight by weight: the biases of keys have no gradient but rounding (softmax takes no notice of them), and AdamW follows it
    torch.testing.assert_close(logits(split, colours), logits(whole, colours), atol=1e-3, rtol=0)


def test_what_a_step_does(small_model: Maker, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the whole batch however it is split, clipped; the learning rate follows the schedule, the average its decay.
    AdamW hides all but the last: it takes no notice of a gradient's scale."""
    limit, rates, averages = 0.5, [], []
    norms: dict[int, list[tuple[float, float]]] = {8: [], 2: []}
    clip, step, moved = nn.utils.clip_grad_norm_, torch.optim.AdamW.step, optimization.ema_decay

    def clipped(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        parameters = list(parameters)
        before = clip(parameters, most)
        after = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None]).norm()
        norms[micro].append((float(before), float(after)))
        return before

    def stepped(optimizer: torch.optim.AdamW, *rest: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *rest)

    def decayed(updates: int, most: float) -> float:
        averages.append(moved(updates, most))
        return averages[-1]

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clipped)
    monkeypatch.setattr("torch.optim.AdamW.step", stepped)
    monkeypatch.setattr(optimization, "ema_decay", decayed)
    for micro in norms:
        run(small_model(), f"micro{micro}", settings={"micro_batch": micro, "clip_norm": limit, "warmup": 0.2, "ema_decay": 0.3})
    assert norms[2][0][0] == pytest.approx(norms[8][0][0], rel=1e-3)
    assert norms[8][0][0] > limit
    assert all(after <= limit * 1.001 for _, after in norms[8])
    assert rates[:10] == pytest.approx([1e-3 * learning_rate_factor(i, steps=10, warmup=0.2) for i in range(10)])
    assert averages[:9] == pytest.approx([2 / 11, 3 / 12, 4 / 13, *[0.3] * 6][:9], abs=0.01)


def test_groups_have_their_own_learning_rates(small_model: Maker, run: Runner) -> None:
    model = small_model()
    before = model.head.fc.weight.clone(), model.stem.conv1.weight.clone()
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("head.")]
    groups = [{"params": rest, "lr": 0.0}, {"params": model.head.parameters()}]
    trained, _ = run(model, settings={"epochs": 1}, groups=groups)
    assert not torch.equal(trained.head.fc.weight, before[0])  # type: ignore[union-attr, arg-type]
    assert torch.equal(trained.stem.conv1.weight, before[1])  # type: ignore[union-attr, arg-type]


def test_accuracy_in_parts_of_any_size(small_model: Maker, colours: LabelledImages) -> None:
    model = small_model()
    expected = (logits(model, colours).argmax(1).numpy() == colours.classes).mean()
    assert accuracy(model, colours, TrainSettings(), make_accelerator("cpu")) == expected


def test_a_loss_that_is_not_finite_ends_the_run(small_model: Maker, run: Runner, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="loss or weights are not finite any more; start again with a lower learning rate"):
        run(small_model(), settings={"learning_rate": 1e30, "warmup": 0, "clip_norm": None})
    assert not (tmp_path / "state").exists()


def test_operators_are_deterministic_in_the_run_alone(small_model: Maker, run: Runner) -> None:
    model, seen = small_model(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    run(model, settings={"epochs": 1})
    assert seen == [True] * 5
    assert not torch.are_deterministic_algorithms_enabled()


def test_only_the_run_that_was_saved_is_resumed(small_model: Maker, run: Runner, tmp_path: Path, colours: LabelledImages) -> None:
    run(small_model(), settings={})
    with pytest.raises(UserError, match=r"is of another run: settings\.augmentation\.flip was 0\.5, is 0\.0; settings\.epochs was 2, is 3"):
        run(small_model(), settings={"epochs": 3, "augmentation": {"flip": 0}}, resume=True)
    with pytest.raises(UserError, match="is of another run: images was "):
        run(small_model(), settings={}, data=replace(colours, classes=colours.classes[::-1].copy()), resume=True)
    with pytest.raises(UserError, match=r"is of another run: weights\.all was "):
        run(small_model(dim=8), settings={}, resume=True)
    with pytest.raises(UserError, match=r"is of another run: origin\.drop_path was None, is 0\.1; resume"):
        run(small_model(), settings={}, origin={"drop_path": 0.1}, resume=True)
    with pytest.raises(UserError, match=r"nothing to resume: .*none does not exist"):
        run(small_model(), "none", settings={}, resume=True)
    whole = (tmp_path / "state").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no state"):
        (tmp_path / "state").write_bytes(damaged)
        with pytest.raises(UserError, match="is no saved run, or a damaged one"):
            run(small_model(), settings={}, resume=True)
    _, anew = run(small_model(), settings={}, resume=True, or_anew=True)
    _, once_more = run(small_model(), "other", settings={})
    assert [epoch.loss for epoch in anew] == [epoch.loss for epoch in once_more]


def test_what_cannot_be_trained(small_model: Maker, run: Runner) -> None:
    with pytest.raises(UserError, match="40 training images do not make one batch of 64"):
        run(small_model(), settings={"batch_size": 64})
    with pytest.raises(UserError, match="batch_size 8 is no multiple of 3"):
        run(small_model(), settings={"micro_batch": 3})
    with pytest.raises(UserError, match="distillation needs both a teacher and the section"):
        run(small_model(), settings={"distillation": {}})
    with pytest.raises(UserError, match="distillation needs both a teacher and the section"):
        run(small_model(), settings={}, teacher=small_model())
