"""Making models: `create_model` for a bare network, `load_model` for one with its labels and preprocessing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gcvit_edge.data import Labels, Preprocessing, default_preprocessing
from gcvit_edge.errors import UserError
from gcvit_edge.model.checkpoint import Checkpoint, config_of, load_weights, read_checkpoint, variant_of
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.info import UNKNOWN_LICENCE, ModelInfo, Origin, config_dict
from gcvit_edge.model.variants import GCViTConfig, nvlabs_crop, variant_config

TIMM_CROP_PCT = 0.875  # of every gcvit model in timm


def create_model(
    name: str = "gcvit_xxtiny",
    weights: str | Path | None = None,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    features_only: bool = False,
    drop_path: float | None = None,
    in_chans: int | None = None,
    dim: int | None = None,
    depths: tuple[int, ...] | None = None,
    num_heads: tuple[int, ...] | None = None,
    window_size: tuple[int, ...] | None = None,
    mlp_ratio: float | None = None,
    layer_scale: float | None = None,
) -> GCViT:
    """A GC ViT in eval mode: (B, in_chans, H, W) float32 -> (B, num_classes) logits.

    name: official variant, whose shape the other arguments change. weights: a file (timm's, NVlabs' or our layout) or
    "hf-hub:ID"; None is random initialisation. img_size: pixels, one side or (height, width), multiples of 32; windows
    scale with it and position biases are interpolated. features_only: no head, forward() returns four feature maps.
    The rest: `GCViTConfig`.

    Raises:
        UserError: unknown name, impossible shape, or weights that cannot be read or do not fit.
    """
    changes = {
        "num_classes": 0 if features_only else num_classes,
        "img_size": (img_size, img_size) if isinstance(img_size, int) else img_size,
        "drop_path": drop_path,
        "in_chans": in_chans,
        "dim": dim,
        "depths": depths,
        "num_heads": num_heads,
        "window_size": window_size,
        "mlp_ratio": mlp_ratio,
        "layer_scale": layer_scale,
    }
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list | tuple) else v for key, v in changes.items() if v is not None}
    config = replace(variant_config(name), **given)
    checkpoint = None if weights is None else read_checkpoint(str(weights))
    return _build(config, checkpoint, str(weights), keep_classes="num_classes" in given)


def _build(config: GCViTConfig, checkpoint: Checkpoint | None, source: str, keep_classes: bool) -> GCViT:
    if checkpoint is not None:
        classes = config.num_classes if keep_classes else checkpoint.config.num_classes
        config = replace(config, se_multiple=checkpoint.config.se_multiple, num_classes=classes)
    model = GCViT(config)
    if checkpoint is not None:
        load_weights(model, checkpoint, source)
    return model.eval()


def load_model(
    weights: str,
    name: str | None = None,
    *,
    num_classes: int | None = None,
    labels: Labels | None = None,
    preprocessing: Preprocessing | None = None,
    unnamed: Callable[[int], Labels | None] = lambda classes: None,
) -> tuple[GCViT, ModelInfo]:
    """A trained classifier with all that travels with it; what is not given is read off the checkpoint.

    The variant is recognised from the tensors; `name` says which is expected, or asks for one of another input size. Labels come from the
    checkpoint, else from `unnamed` for this number of classes, else they are the class numbers. The preprocessing comes from the
    checkpoint, else it is that of timm (crop 0.875) or, for NVlabs' files, of NVlabs' training.

    Raises:
        UserError: as `create_model`; or labels that do not match the number of classes; or no head.
    """
    checkpoint = read_checkpoint(weights)
    config = config_of(checkpoint, name, preprocessing and preprocessing.size)
    if num_classes is not None:
        config = replace(config, num_classes=num_classes)
    model = _build(config, checkpoint, weights, keep_classes=num_classes is not None)
    if not model.config.num_classes:
        raise UserError(f"checkpoint {weights} has no classifier head; quantization needs one")
    labels = labels or checkpoint.labels or unnamed(model.config.num_classes)
    return model, _describe(model.config, labels, preprocessing or checkpoint.preprocessing, checkpoint.origin)


def describe_model(model: GCViT, labels: Labels | None = None, preprocessing: Preprocessing | None = None) -> ModelInfo:
    """The ModelInfo of a network that was made in memory.

    Raises:
        UserError: labels that do not match the number of classes, or preprocessing for another input size.
    """
    return _describe(model.config, labels, preprocessing, Origin(source="made in memory", layout="none", licence=UNKNOWN_LICENCE))


def _describe(config: GCViTConfig, labels: Labels | None, preprocessing: Preprocessing | None, origin: Origin) -> ModelInfo:
    """What is not given is the default; labels are then the class numbers."""
    classes = config.num_classes
    labels = labels or Labels.of(str(index) for index in range(classes))
    if len(labels.names) != classes:
        raise UserError(
            f"{len(labels.names)} labels were given for {classes} classes of {origin.source}; give one label a class, in the order of "
            "the logits"
        )
    name = variant_of(config) or "gcvit_custom"
    preprocessing = preprocessing or _default_preprocessing(config, name, origin)
    if preprocessing.size != config.img_size:
        raise UserError(f"the preprocessing makes {preprocessing.size} images, the model takes {config.img_size}; make the two agree")
    return ModelInfo(name=name, config=config_dict(config), labels=labels, preprocessing=preprocessing, origin=origin)


def _default_preprocessing(config: GCViTConfig, name: str, origin: Origin) -> Preprocessing:
    crop_pct, squash = nvlabs_crop(name) if origin.layout == "nvlabs" else (TIMM_CROP_PCT, False)
    return default_preprocessing(config.img_size, crop_pct, squash)
