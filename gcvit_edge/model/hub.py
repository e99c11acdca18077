"""Checkpoints of the Hugging Face hub, and what timm writes beside them."""

import json
from pathlib import Path
from typing import Any

from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.errors import UserError

PREFIX = "hf-hub:"
_PICKLE = "pytorch_model.bin"


def download(source: str) -> Path:
    """The weights of `hf-hub:ID`, from the cache if they are there; timm's config.json, if there is one, lies beside them.

    Raises:
        UserError: no such repository, no connection, or no weights in it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = source.removeprefix(PREFIX)
    for patterns in (("*.safetensors", "*.pth", "*.pth.tar"), (_PICKLE,)):  # which many have beside a safetensors file of the same
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "config.json"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise UserError(
                f"cannot download {name} from the Hugging Face hub: {error}; check the name and the connection, "
                "or download the file and give its path"
            ) from error
        if found := [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            return found[0]
    raise UserError(f"{name} on the Hugging Face hub holds no .safetensors or .pth file, nor {_PICKLE}")


def timm_labels(config: dict[str, Any]) -> Labels | None:
    """The class names of timm's config.json, if it has them: a list, or by the number of the class.

    Raises:
        UserError: they are neither, or of some classes only.
    """
    pretrained = _pretrained(config)
    names: Any = config.get("label_names") or pretrained.get("label_names") or pretrained.get("labels")
    if not names:
        return None
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("label_names of config.json is no list of class names, nor has one for every class; give --labels FILE")
    return Labels.of(names)


def read_timm_config(folder: Path) -> dict[str, Any]:
    """timm's config.json; {} where there is none.

    Raises:
        UserError: it is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}; download it again") from error


def timm_preprocessing(config: dict[str, Any], source: str) -> Preprocessing | None:
    """What `pretrained_cfg` of timm's config.json says, if it does.

    Raises:
        UserError: it asks for what `Preprocessing` cannot do.
    """
    timm = _pretrained(config)
    if "input_size" not in timm:
        return None
    try:
        size = tuple(timm["input_size"][1:])
        if (crop := timm.get("crop_mode", "center")) not in ("center", "squash"):
            raise ValueError(f"crop_mode {crop!r}, expected 'center' or 'squash'")
        return Preprocessing(
            size=size,
            resize=int(max(size) / timm.get("crop_pct", 0.875)),
            mode="squash" if crop == "squash" else "shortest_edge",
            interpolation=timm.get("interpolation", "bicubic"),
            mean=timm["mean"],
            std=timm["std"],
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:  # pydantic's are ValueErrors
        problem = " ".join(str(error).split())
        raise UserError(f"the preprocessing that {source} asks for cannot be done: {problem}; give --preprocessing FILE") from error


def _pretrained(config: dict[str, Any]) -> dict[str, Any]:
    """What timm says of the weights; in its older files there is nothing around it."""
    return config.get("pretrained_cfg", config) or {}
