"""The training loop: any classifier, alone or with a teacher, in one process or several.

Every random number follows from the seed and a position (epoch, image, step, forward pass), and none from the state of a
generator. So a resumed run continues bit for bit (on a CPU), and two processes draw what one would.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from gcvit_edge.cpus import default_threads
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.progress import Bar, Steps
from gcvit_edge.training.devices import memory_kept
from gcvit_edge.training.images import LabelledImages, Samples, derived_seed, epoch_order, loader
from gcvit_edge.training.optimization import Groups, average, learning_rate_factor, objective, parameter_groups
from gcvit_edge.training.settings import TrainSettings, micro_batches, steps_per_epoch
from gcvit_edge.training.state import read_state, write_state

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_SECONDS = 60  # between two saved states within an epoch
_REPORT_STEPS = 5  # reading the loss makes a GPU wait
_EVALUATION_BATCH = 32
_MAX_WORKERS = 8  # processes that decode images for a GPU


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave. loss, accuracy: means over the training images as they were seen. evaluation: accuracy of the averaged
    weights on the evaluation images. seconds: since the epoch began, or was resumed."""

    loss: float
    accuracy: float
    evaluation: float | None
    seconds: float


@dataclass
class _Run:
    """A run between two optimizer steps, and the file that it is saved to.

    network is `model` as the processes share it; average is the model with averaged weights. totals: (loss, hits, images) of
    this epoch so far in all processes, float64. identity: what a run must have in common with a saved one to continue it.
    """

    settings: TrainSettings
    accelerator: "Accelerator"
    model: nn.Module
    network: nn.Module
    teacher: nn.Module | None
    average: AveragedModel
    optimizer: AdamW
    schedule: LambdaLR
    totals: Tensor
    file: Path
    identity: dict[str, Any]
    step: int = 0
    history: list[Epoch] = field(default_factory=list)
    saved: float = field(default_factory=perf_counter)

    def save(self) -> None:
        """Writes all that changes, in the main process."""
        self.saved = perf_counter()
        if self.accelerator.is_main_process:
            _check_finite(self.totals)  # a broken run is not worth saving
            _check_finite(torch.stack([value.abs().amax() for value in self.average.parameters()]))  # the last step shows in no loss
            parts = {name: getattr(self, name).state_dict() for name in _PARTS}
            place = {"step": self.step, "totals": self.totals, "history": [asdict(epoch) for epoch in self.history]}
            write_state(self.file, self.identity, parts | place)

    def load(self) -> None:
        """Goes on where the run was saved."""
        state = read_state(self.file, self.identity)
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.history = state["step"], [Epoch(**epoch) for epoch in state["history"]]
        self.totals.copy_(state["totals"])


_PARTS = ("model", "average", "optimizer", "schedule")


def fit(
    model: nn.Module,
    data: LabelledImages,
    settings: TrainSettings,
    accelerator: "Accelerator",
    *,
    state: Path,
    resume: bool = False,
    or_anew: bool = False,
    teacher: nn.Module | None = None,
    groups: Groups | None = None,
    evaluation: LabelledImages | None = None,
    origin: dict[str, Any] | None = None,
    steps: Steps | None = None,
) -> tuple[nn.Module, list[Epoch]]:
    """Trains `model` in place; gives the model with the average of its weights, in eval mode, and what every epoch gave.

    model: (B, 3, H, W) float32 -> (B, classes). state: file that the run is saved to, every `SAVE_SECONDS` and after every
    epoch; `resume` continues from it, `or_anew` starts again where it is of another run or damaged. teacher: learnt from as
    `settings.distillation` says. groups: AdamW's parameter groups, each with an "lr" of its own if it wants one; default,
    `parameter_groups`. evaluation: images of an accuracy after every epoch.
    origin: what else a resumed run must have in common with the saved one, such as the weights that it starts from.

    Processes average their gradients. The random numbers of a forward pass belong to it, so with the same `micro_batch` any
    number of processes computes what one would, up to the order of sums.

    Raises:
        UserError: a batch that the images or the processes do not allow; nothing, or another run, to resume; a broken image.
        CheckFailed: loss or weights are not finite, or the run cannot be saved.
    """
    if (teacher is None) != (settings.distillation is None):
        raise UserError("distillation needs both a teacher and the section `distillation` of the training settings")
    steps = steps or Steps()
    per_epoch = steps_per_epoch(len(data), settings)
    micro_batches(settings, accelerator.num_processes)
    device = accelerator.device
    model.to(device)
    groups = parameter_groups(model, settings.weight_decay) if groups is None else groups
    identity = data.identity() | {"settings": settings.model_dump(mode="json"), "weights": _count(model), "origin": origin or {}}
    if teacher is not None:
        identity["teacher"] = weights_digest(teacher.state_dict())
    optimizer = AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    run = _Run(
        settings=settings,
        accelerator=accelerator,
        model=model,
        network=model,
        teacher=None if teacher is None else teacher.to(device).eval(),
        average=_averaged(model, settings.ema_decay),
        optimizer=optimizer,
        schedule=LambdaLR(optimizer, partial(learning_rate_factor, steps=settings.epochs * per_epoch, warmup=settings.warmup)),
        totals=torch.zeros(3, dtype=torch.float64, device=device),
        file=state,
        identity=identity,
    )
    if resume:
        try:
            run.load()
        except UserError:
            if not or_anew:
                raise
    run.network = accelerator.prepare_model(model)
    with memory_kept(device), _reproducible(device):
        for epoch in range(run.step // per_epoch, settings.epochs):
            first = run.step - epoch * per_epoch
            with steps.step(f"epoch {epoch + 1} of {settings.epochs}", per_epoch, first) as bar:
                start = perf_counter()
                _train_epoch(run, data, epoch, range(first, per_epoch), bar)
                loss, right = _means(run.totals)
                correct = None if evaluation is None else accuracy(run.average, evaluation, settings, accelerator)
                run.history.append(Epoch(loss, right, correct, perf_counter() - start))
                bar.note(_summary(run.history[-1]))
            run.totals.zero_()
            run.save()
    return run.average.module, run.history


def _averaged(model: nn.Module, limit: float) -> AveragedModel:
    """The average of a model's weights, its counter on the CPU: the one that it hands over a GPU would be waited for."""
    averaged = AveragedModel(model).eval()
    averaged.multi_avg_fn = lambda old, new, _: average(old, new, int(averaged.n_averaged), limit=limit)
    return averaged


def _train_epoch(run: _Run, data: LabelledImages, epoch: int, steps: range, bar: Bar) -> None:
    """The optimizer steps `steps` of an epoch."""
    settings, accelerator = run.settings, run.accelerator
    size, passes = micro_batches(settings, accelerator.num_processes)
    order = epoch_order(len(data), settings.seed, epoch)[: steps.stop * settings.batch_size]
    shares = order.reshape(steps.stop, accelerator.num_processes, passes, size)[steps.start :, accelerator.process_index]
    samples = Samples(data, settings.augmentation, settings.seed, epoch)
    batches = loader(samples, shares.reshape(-1, size).tolist(), accelerator.device, _workers(accelerator))
    run.model.train()
    for step in steps:
        seen = torch.zeros_like(run.totals)
        for number in range(passes):
            images, classes = next(batches)
            # the noise of a forward pass, such as drop path, belongs to its place in the batch
            torch.manual_seed(derived_seed(settings.seed, run.step, accelerator.process_index * passes + number, 1))
            with nullcontext() if number == passes - 1 else accelerator.no_sync(run.network):
                seen += _forward_backward(run, images, classes, passes)
        run.totals += _summed(accelerator, seen)
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.schedule.step()
        run.average.update_parameters(run.model)
        run.step += 1
        bar()
        if step % _REPORT_STEPS == 0:
            loss, right = _means(run.totals)
            bar.note(f"loss {loss:.4g}, accuracy {right:.1%}")
        if perf_counter() - run.saved > SAVE_SECONDS and step + 1 < steps.stop:
            run.save()


def _forward_backward(run: _Run, images: Tensor, classes: Tensor, passes: int) -> Tensor:
    """Adds a forward pass's part of the gradients, 1 / passes of them; gives its (loss, hits, images)."""
    device = run.accelerator.device
    images, classes = images.to(device, non_blocking=True), classes.to(device, non_blocking=True)
    with _precision(run.settings, device):
        logits = run.network(images).float()
        with torch.no_grad():
            taught = None if run.teacher is None else run.teacher(images).float()
    loss = objective(logits, classes, taught, run.settings)
    run.accelerator.backward(loss / passes)
    hits = (logits.detach().argmax(1) == classes).sum()
    return torch.stack([loss.detach().double() * len(classes), hits, torch.full_like(hits, len(classes))])


def accuracy(model: nn.Module, data: LabelledImages, settings: TrainSettings, accelerator: "Accelerator") -> float:
    """Fraction of the images whose class has the highest logit, in the precision of the training; shared out over the processes."""
    device = accelerator.device
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    batches = [mine[start : start + _EVALUATION_BATCH] for start in range(0, len(mine), _EVALUATION_BATCH)]
    hits = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode(), _precision(settings, device):
        for images, classes in loader(Samples(data), batches, device, _workers(accelerator)):
            hits += (model(images.to(device)).argmax(1) == classes.to(device)).sum()
    return _summed(accelerator, hits).item() / len(data)


def _summed(accelerator: "Accelerator", tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    total = accelerator.reduce(tensor)
    return total if isinstance(total, Tensor) else tensor


def _count(model: nn.Module) -> dict[str, int]:
    """Numbers of all and of trainable parameters."""
    return {"all": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and values: a run goes on with the weights, of itself and its teacher, that it began with."""
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _means(totals: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    _check_finite(totals)
    loss, hits, images = totals.tolist()
    return loss / images, hits / images


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise CheckFailed(
            "loss or weights are not finite any more; start again with a lower learning rate (--lr), or with precision float32"
        )


def _summary(epoch: Epoch) -> str:
    text = f"loss {epoch.loss:.4g}, accuracy {epoch.accuracy:.1%}"
    return text if epoch.evaluation is None else f"{text}, evaluation {epoch.evaluation:.2%}"


def _workers(accelerator: "Accelerator") -> int:
    """Processes that decode images: on a CPU none, which the network needs for itself."""
    if accelerator.device.type == "cpu":
        return 0
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, as launchers say it
    return min(_MAX_WORKERS, max(1, default_threads() // neighbours))


def _precision(settings: TrainSettings, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """On a CPU, operators whose threads add in a fixed order; gradients of lookups do not otherwise. Costs nothing there. On a GPU, where
    they cost a lot, only that float32 is no TF32, which cuDNN otherwise computes convolutions in."""
    if device.type != "cpu":
        tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
