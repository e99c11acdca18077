"""Training settings: what is refused, and how a batch is shared out."""

from pathlib import Path

import pytest

from gcvit_edge.errors import UserError
from gcvit_edge.training.settings import TrainSettings, micro_batches, read_settings, steps_per_epoch


def test_a_file_and_flags_over_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nbatch_size: 64\naugmentation: {flip: 0}\ndistillation: {temperature: 2}\n", encoding="utf-8")
    settings = read_settings(file, {"batch_size": 16})
    assert (settings.epochs, settings.batch_size) == (3, 16)
    assert settings.augmentation is not None
    assert (settings.augmentation.flip, settings.augmentation.crop_scale) == (0.0, (0.35, 1.0))
    assert settings.distillation is not None
    assert (settings.distillation.temperature, settings.distillation.weight) == (2.0, 1.0)
    assert read_settings(None, {}) == TrainSettings()


def test_settings_survive_json() -> None:
    settings = TrainSettings(micro_batch=4, augmentation=None)
    assert TrainSettings.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"settings .*mine\.yaml is not valid:\n  unknown key 'epoch'; did you mean 'epochs'\?"),
        ("augmentation: {flips: 1}", r"unknown key 'augmentation\.flips'; did you mean 'flip'\?"),
        ("augmentation: {crop_scale: [0.8, 0.2]}", "crop_scale is \\[smallest, largest\\], above 0"),
        ("augmentation: {crop_scale: [0, 1]}", "above 0"),
        ("distillation: {weight: 2}", r"distillation\.weight: got 2; .*less than or equal to 1"),
        ("epochs: 0", "epochs: got 0; "),
        ("learning_rate: .inf", "learning_rate: got inf; "),
        ("precision: int8", "precision: got 'int8'; "),
        ("ema_decay: 1", "ema_decay: got 1; .*less than 1"),
        ("[1]", "must be a mapping of keys to values, got list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_mistakes_are_explained(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_settings(file, {})


def test_wrong_flags_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training configuration is not valid:\n  seed: got -1; "):
        read_settings(None, {"seed": -1})
    with pytest.raises(UserError, match=r"settings file .*none\.yaml does not exist"):
        read_settings(tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "shared"), [(32, None, 1, (32, 1)), (32, None, 4, (8, 1)), (32, 4, 2, (4, 4)), (6, 6, 1, (6, 1))]
)
def test_a_batch_is_shared_out(batch: int, micro: int | None, processes: int, shared: tuple[int, int]) -> None:
    assert micro_batches(TrainSettings(batch_size=batch, micro_batch=micro), processes) == shared


@pytest.mark.parametrize(("batch", "micro", "processes"), [(32, 5, 1), (32, None, 3), (8, 8, 2), (2, None, 4)])
def test_a_batch_that_cannot_be_shared_out(batch: int, micro: int | None, processes: int) -> None:
    with pytest.raises(UserError, match=f"batch_size {batch} is no multiple of .*change batch_size or micro_batch"):
        micro_batches(TrainSettings(batch_size=batch, micro_batch=micro), processes)


def test_steps_of_an_epoch() -> None:
    settings = TrainSettings(batch_size=8)
    assert [steps_per_epoch(images, settings) for images in (8, 15, 16)] == [1, 1, 2]
    with pytest.raises(UserError, match="7 training images do not make one batch of 8"):
        steps_per_epoch(7, settings)
