"""Checkpoints: timm's and NVlabs' files and our own, read without ever running code from them.

Our layout is timm's key layout in safetensors, with a `ModelInfo` as JSON in the metadata under "gcvit_edge".
"""

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.errors import UserError
from gcvit_edge.model import hub
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.info import NVLABS_LICENCE, UNKNOWN_LICENCE, ModelInfo, Origin, read_config
from gcvit_edge.model.layout import Size, State, from_nvlabs, infer_config
from gcvit_edge.model.variants import VARIANTS, GCViTConfig, variant_config
from gcvit_edge.paths import written_whole

# what `torch.load` may raise of a damaged file, by where the damage is
DAMAGED_PICKLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError,
    AttributeError, AssertionError,
)  # fmt: skip
_ADVICE = "download it again, or give a .safetensors file or one of torch.save"
_METADATA_KEY = "gcvit_edge"
_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel and AveragedModel, of torch.compile, of Lightning
_COUNTER = "n_averaged"  # of AveragedModel, beside the weights


@dataclass(frozen=True)
class Checkpoint:
    """A file's weights in our key layout, float32, with what the file says about itself. sizes: the input sizes (height, width) that it
    may be for, where it does not say which; `config` then has the first."""

    state: State
    config: GCViTConfig
    origin: Origin
    name: str | None = None
    labels: Labels | None = None
    find_preprocessing: Callable[[], Preprocessing | None] = lambda: None
    sizes: tuple[Size, ...] | None = None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Looked at when it is asked for, so that another can be given in its place.

        Raises:
            UserError: the hub's is none that `Preprocessing` can do.
        """
        return self.find_preprocessing()


def read_checkpoint(source: str) -> Checkpoint:
    """Reads `source`: a .safetensors, .pth, .pt or .pth.tar file in timm's, NVlabs' or our layout, or `hf-hub:ID`.

    Raises:
        UserError: the file is missing, truncated, of no known layout, a pickle that holds code (never executed), or holds nan or inf.
    """
    from_hub = source.startswith(hub.PREFIX)
    path = hub.download(source) if from_hub else Path(source)
    if path.is_dir():
        raise UserError(f"checkpoint {source} is a folder; give the .safetensors or .pth file in it")
    if not path.is_file():
        raise UserError(f"checkpoint {source} does not exist; give a .safetensors or .pth file, or hf-hub:ID")
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    state = _without_prefixes(state)
    nvlabs = any(key.startswith("patch_embed.") for key in state)
    state = from_nvlabs(state) if nvlabs else state
    state = {key: value.float() for key, value in state.items()}
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        raise UserError(
            f"checkpoint {source} holds nan or inf in {', '.join(broken[:3])}: "
            "the run that made it diverged, or float16 was too small for it"
        )
    if _METADATA_KEY in metadata:
        try:
            info = ModelInfo.model_validate_json(metadata[_METADATA_KEY])
            config = read_config(info.config)
        except (ValidationError, TypeError) as error:
            raise UserError(f"the metadata of checkpoint {source} is damaged ({str(error).splitlines()[0]}); convert it again") from error
        return Checkpoint(state, config, info.origin, info.name, info.labels, lambda: info.preprocessing)
    config, sizes = infer_config(state, source)
    possible = sizes if len(sizes) > 1 else None
    layout = "nvlabs" if nvlabs else "timm"
    derived = nvlabs or source.startswith(f"{hub.PREFIX}timm/")
    origin = Origin(source=source if from_hub else path.name, layout=layout, licence=NVLABS_LICENCE if derived else UNKNOWN_LICENCE)
    if not from_hub:
        return Checkpoint(state, config, origin, sizes=possible)
    timm = hub.read_timm_config(path.parent)
    return Checkpoint(state, config, origin, None, hub.timm_labels(timm), lambda: hub.timm_preprocessing(timm, source), possible)


def save_checkpoint(model: GCViT, info: ModelInfo, path: Path, *, half: bool) -> None:
    """Writes the model as safetensors in our layout, `info` in the metadata; weights as float16 if `half`.

    Raises:
        UserError: a weight is too large for float16.
        OSError: the file cannot be written; what was there before still is.
    """
    dtype = torch.float16 if half else torch.float32
    state = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    if half and (lost := [key for key, value in state.items() if not value.isfinite().all()]):
        raise UserError(f"float16 is too small for {', '.join(lost[:3])}: its largest number is 65,504; leave --half out")
    with written_whole(path) as partial:
        partial.write_bytes(save(state, {"format": "pt", _METADATA_KEY: info.model_dump_json()}))


def variant_of(config: GCViTConfig) -> str | None:
    """Name of the official variant with this structure, whatever its classes and channels: the one of this input size, else the first."""
    alike = {name: known.img_size for name, known in VARIANTS.items() if _alike(known, config)}
    return next((name for name, size in alike.items() if size == config.img_size), next(iter(alike), None))


def config_of(checkpoint: Checkpoint, name: str | None, size: tuple[int, int] | None = None) -> GCViTConfig:
    """The shape of variant `name` that a checkpoint is for: its own if it is one of `name`, of whatever input size, or if `name` is None.
    size: the (height, width) that is wanted, for one that does not say which it is for.

    Raises:
        UserError: the name is unknown, or no size is given to a checkpoint that needs one.
    """
    wanted = checkpoint.config if name is None else variant_config(name)
    config = checkpoint.config if wanted == VARIANTS.get(variant_of(checkpoint.config) or "") else wanted
    if checkpoint.sizes is None:
        return config
    if size is None:
        raise UserError(_which_size(checkpoint.origin.source, checkpoint.sizes))
    return replace(config, img_size=size)


def load_weights(model: GCViT, checkpoint: Checkpoint, source: str) -> None:
    """Copies a checkpoint into `model`; position biases of other windows are interpolated (bicubic).

    Raises:
        UserError: another variant, number of classes or channels, or missing or extra keys.
    """
    have, want = checkpoint.config, model.config
    if not _alike(have, want):
        name = variant_of(have)
        guess = f"it is a {name}: give --model {name}" if name else f"its shape is {_structure(have)}"
        wanted = f"a {named}" if (named := variant_of(want)) else f"of the requested shape {_structure(want)}"
        raise UserError(f"checkpoint {source} is not {wanted}; {guess}")
    if have.in_chans != want.in_chans:
        raise UserError(f"checkpoint {source} has {have.in_chans} input channels, the model {want.in_chans}; set in_chans to match")
    if checkpoint.sizes is not None and have.window_size is None:
        have = replace(have, img_size=_turned_as(want.img_size, checkpoint.sizes, source))
    state = dict(checkpoint.state)
    if model.head is None:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    elif have.num_classes != want.num_classes:
        raise UserError(
            f"checkpoint {source} has {have.num_classes} classes, but {want.num_classes} were asked for; "
            f"leave num_classes out or set it to {have.num_classes}"
        )
    for stage in range(len(want.depths)):
        for block in range(want.depths[stage]):
            key = f"stages.{stage}.blocks.{block}.attn.rel_pos.relative_position_bias_table"
            if key in state:
                state[key] = _resize_bias(state[key], have.window(stage), want.window(stage))
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        parts = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in (("missing", missing), ("extra", extra)) if keys]
        raise UserError(f"checkpoint {source} does not fit the model: {' and '.join(parts)} keys; is it complete and of this variant?")
    wrong = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in expected.items() if state[k].shape != v.shape]
    if wrong:
        raise UserError(f"checkpoint {source} does not fit the model: wrong shapes: {', '.join(wrong[:3])}")
    model.load_state_dict(state)


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is truncated or no safetensors file ({error}); {_ADVICE}") from error


def _read_pickle(path: Path) -> State:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # which timm's and NVlabs' training scripts save with the weights
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.read_bytes()[:1] in (b"\x80", b"P"):  # a pickle, or a zip of one: whole, but with more in it than tensors
            raise UserError(
                f"checkpoint {path} is a pickle that holds more than weights, and was not executed ({_reason(error)}); "
                "save its state_dict alone, or use safetensors"
            ) from error
        raise UserError(f"checkpoint {path} is truncated or no PyTorch file; {_ADVICE}") from error
    except DAMAGED_PICKLE as error:
        said = f" ({error})" if isinstance(error, RuntimeError | OSError) and str(error) else ""  # the others' words are of the unpickler
        raise UserError(f"checkpoint {path} is truncated or no PyTorch file{said}; {_ADVICE}") from error
    if not (state := _weights_in(data)):
        raise UserError(f"checkpoint {path} holds no state_dict (looked for {', '.join(_WRAPPERS)}); save model.state_dict()")
    return state


def _weights_in(data: Any) -> State:
    """The first state_dict in what was saved, averaged weights before others; {} if there is none."""
    if not isinstance(data, dict):
        return {}
    if found := next(filter(None, (_weights_in(data.get(wrapper)) for wrapper in _WRAPPERS)), None):
        return found
    return {str(key): value for key, value in data.items()} if all(isinstance(value, Tensor) for value in data.values()) else {}


def _without_prefixes(state: State) -> State:
    """As the network itself names its weights: what modules around it put before every name is taken off, however many there were."""
    state = {key: value for key, value in state.items() if key != _COUNTER}
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _without_prefixes({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _reason(error: Exception) -> str:
    found = re.search(r"(Unsupported[^\n]*|GLOBAL [^\s]+)", str(error))
    return found.group(1) if found else "weights_only load refused it"


def _turned_as(wanted: Size, sizes: tuple[Size, ...], source: str) -> Size:
    """Of a size and the same turned, the one that is turned as `wanted` is.

    Raises:
        UserError: `wanted` is square.
    """
    if wanted[0] == wanted[1]:
        raise UserError(_which_size(source, sizes))
    return next(size for size in sizes if (size[0] > size[1]) == (wanted[0] > wanted[1]))


def _which_size(source: str, sizes: tuple[Size, ...]) -> str:
    """What to say of a checkpoint whose input size is not known."""
    return (
        f"checkpoint {source} was made for {' or '.join(f'{height}x{width}' for height, width in sizes)} pixels (height x width), and does "
        "not say which; give --preprocessing with its size, or in Python `create_model(img_size=(height, width))`"
    )


def _alike(one: GCViTConfig, other: GCViTConfig) -> bool:
    """Whether two structures are one. Of MLPs the widths count: several ratios give the same."""
    widths, others = ([config.mlp_dim(stage) for stage in range(4)] for config in (one, other))
    return widths == others and _structure(replace(one, mlp_ratio=other.mlp_ratio)) == _structure(other)


def _structure(config: GCViTConfig) -> dict[str, Any]:
    fields = asdict(config)
    out = {key: fields[key] for key in ("dim", "depths", "num_heads", "mlp_ratio")}
    return out | {"layer_scale": config.layer_scale is not None}


def _resize_bias(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Relative position bias (positions, heads) of window `old` for window `new`, bicubic over both axes."""
    if old == new or table.shape[0] != (2 * old[0] - 1) * (2 * old[1] - 1):
        return table
    image = table.T.reshape(1, -1, 2 * old[0] - 1, 2 * old[1] - 1)
    image = F.interpolate(image, (2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic", align_corners=False)
    return image.reshape(table.shape[1], -1).T.contiguous()
