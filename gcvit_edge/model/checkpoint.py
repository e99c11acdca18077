"""Checkpoints: timm's and NVlabs' files and our own, read without ever running code from them.

Our layout is timm's key layout in safetensors, with a `ModelInfo` as JSON in the metadata under "gcvit_edge".
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from gcvit_edge.model.variants import VARIANTS, GCViTConfig, variant_config

State = dict[str, Tensor]
_METADATA_KEY = "gcvit_edge"
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Checkpoint:
    """A file's weights in our key layout, float32, with what the file says about itself."""

    state: State
    config: GCViTConfig
    origin: Origin
    name: str | None = None
    labels: Labels | None = None
    find_preprocessing: Callable[[], Preprocessing | None] = lambda: None

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
    nvlabs = any(key.startswith("patch_embed.") for key in state)
    state = _from_nvlabs(state) if nvlabs else state
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
    config = infer_config(state, source)
    layout = "nvlabs" if nvlabs else "timm"
    derived = nvlabs or source.startswith(f"{hub.PREFIX}timm/")
    origin = Origin(source=source if from_hub else path.name, layout=layout, licence=NVLABS_LICENCE if derived else UNKNOWN_LICENCE)
    if not from_hub:
        return Checkpoint(state, config, origin)
    timm = hub.read_timm_config(path.parent)
    return Checkpoint(state, config, origin, None, hub.timm_labels(timm), lambda: hub.timm_preprocessing(timm, source))


def save_checkpoint(model: GCViT, info: ModelInfo, path: Path, *, half: bool) -> None:
    """Writes the model as safetensors in our layout, `info` in the metadata; weights as float16 if `half`.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    dtype = torch.float16 if half else torch.float32
    state = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(save(state, {"format": "pt", _METADATA_KEY: info.model_dump_json()}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def variant_of(config: GCViTConfig) -> str | None:
    """Name of the official variant with this structure, whatever its classes and channels: the one of this input size, else the first."""
    alike = {name: known.img_size for name, known in VARIANTS.items() if _structure(known) == _structure(config)}
    return next((name for name, size in alike.items() if size == config.img_size), next(iter(alike), None))


def config_of(checkpoint: Checkpoint, name: str | None) -> GCViTConfig:
    """The shape of variant `name` that a checkpoint is for: its own if it is one of `name`, of whatever input size, or if `name` is None.

    Raises:
        UserError: the name is unknown.
    """
    wanted = checkpoint.config if name is None else variant_config(name)
    return checkpoint.config if wanted == VARIANTS.get(variant_of(checkpoint.config) or "") else wanted


def load_weights(model: GCViT, checkpoint: Checkpoint, source: str) -> None:
    """Copies a checkpoint into `model`; position biases of other windows are interpolated (bicubic).

    Raises:
        UserError: another variant, number of classes or channels, or missing or extra keys.
    """
    have, want = checkpoint.config, model.config
    if _structure(have) != _structure(want):
        name = variant_of(have)
        guess = f"it is a {name}: give --model {name}" if name else f"its shape is {_structure(have)}"
        raise UserError(f"checkpoint {source} is not of the requested variant {_structure(want)}; {guess}")
    if have.in_chans != want.in_chans:
        raise UserError(f"checkpoint {source} has {have.in_chans} input channels, the model {want.in_chans}; set in_chans to match")
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
        raise UserError(f"checkpoint {path} is truncated or no safetensors file ({error}); download it again") from error


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
        raise UserError(f"checkpoint {path} is truncated or no PyTorch file; download it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"checkpoint {path} is truncated or no PyTorch file ({error}); download it again") from error
    while isinstance(data, dict) and (wrapper := next((w for w in _WRAPPERS if isinstance(data.get(w), dict)), None)):
        data = data[wrapper]
    state = {str(key).removeprefix("module."): value for key, value in data.items()} if isinstance(data, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint {path} holds no state_dict (looked for {', '.join(_WRAPPERS)}); save model.state_dict()")
    return state


def _reason(error: Exception) -> str:
    found = re.search(r"(Unsupported[^\n]*|GLOBAL [^\s]+)", str(error))
    return found.group(1) if found else "weights_only load refused it"


_NVLABS_RULES = [
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    (r"^levels\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.", lambda m: f"stages.{m[1]}.global_block.blocks.conv{int(m[2]) + 1}."),
    (r"^levels\.", "stages."),
    (r"\.conv\.0\.", ".conv_dw."),
    (r"\.conv\.2\.fc\.0\.", ".se.fc1."),
    (r"\.conv\.2\.fc\.2\.", ".se.fc2."),
    (r"\.conv\.3\.", ".conv_pw."),
    (r"(downsample|stem\.down)\.(conv_dw|conv_pw|se)\.", r"\1.conv_block.\2."),
    (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos.relative_position_bias_table"),
    (r"\.gamma1$", ".ls1.gamma"),
    (r"\.gamma2$", ".ls2.gamma"),
    (r"^norm\.", "stages.3.norm."),
    (r"^head\.", "head.fc."),
]


def _from_nvlabs(state: State) -> State:
    """NVlabs' keys to ours; the buffer relative_position_index is recomputed, SE linears become 1x1 convolutions."""
    out = {}
    for key, value in state.items():
        if key.endswith("relative_position_index"):
            continue
        for pattern, new in _NVLABS_RULES:
            key = re.sub(pattern, new, key)
        out[key] = value[:, :, None, None] if ".se.fc" in key and value.ndim == 2 else value
    return out


def infer_config(state: State, source: str) -> GCViTConfig:
    """The shape that a state dict in our layout was made for, read off its tensors.

    Raises:
        UserError: the keys are not those of a GC ViT.
    """
    try:
        dim, in_chans = state["stem.conv1.weight"].shape[:2]
        depths, heads, windows = [], [], []
        for stage in range(4):
            table = state[f"stages.{stage}.blocks.0.attn.rel_pos.relative_position_bias_table"]
            heads.append(table.shape[1])
            windows.append((round(table.shape[0] ** 0.5) + 1) // 2)
            pattern = re.compile(rf"stages\.{stage}\.blocks\.(\d+)\.")
            depths.append(1 + max(int(found[1]) for key in state if (found := pattern.match(key))))
        hidden = state["stages.0.blocks.0.mlp.fc1.weight"].shape[0]
        se_dim = state["stem.down.conv_block.se.fc1.weight"].shape[0]
        scale = state.get("stages.0.blocks.0.ls1.gamma")
        head = state.get("head.fc.weight", state.get("head.fc.bias"))
    except (KeyError, ValueError, IndexError) as error:
        sample = ", ".join(list(state)[:3])
        raise UserError(
            f"checkpoint {source} is no complete GC ViT in timm's or NVlabs' key layout: {error} is missing; "
            f"it has {len(state)} keys, such as {sample}"
        ) from error
    scaled = windows == [windows[3], windows[3], windows[3] * 2, windows[3]]
    return GCViTConfig(
        dim=dim,
        depths=tuple(depths),
        num_heads=tuple(heads),
        mlp_ratio=hidden / dim,
        layer_scale=None if scale is None else 1e-5,
        img_size=(windows[3] * 32, windows[3] * 32),
        window_size=None if scaled else tuple(windows),
        in_chans=in_chans,
        num_classes=0 if head is None else head.shape[0],
        se_multiple=8 if se_dim != dim // 4 else 1,
    )


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
