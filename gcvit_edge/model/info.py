"""What travels with a model's weights: name, shape, labels, preprocessing, origin and licence. No torch."""

from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict

from gcvit_edge.data import Labels, Preprocessing
from gcvit_edge.model.variants import GCViTConfig

# The NVlabs/GCVit README states it for all of NVIDIA's weights; timm's hub copies are the same weights, whatever the
# licence field of timm's configuration says.
NVLABS_LICENCE = "CC-BY-NC-SA-4.0"
UNKNOWN_LICENCE = "unknown (not stated by the checkpoint; CC-BY-NC-SA-4.0 if derived from NVIDIA's GC ViT weights)"


class Origin(BaseModel):
    """Where weights come from. layout: the key layout of the file: ours, timm or nvlabs; none for random weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    layout: str
    licence: str


class ModelInfo(BaseModel):
    """A model apart from its weights. name: official variant, or "gcvit_custom"; config: fields of GCViTConfig."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    config: dict[str, Any]
    labels: Labels
    preprocessing: Preprocessing
    origin: Origin


def config_dict(config: GCViTConfig) -> dict[str, Any]:
    """The fields of a config as JSON holds them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def read_config(fields: dict[str, Any]) -> GCViTConfig:
    """The inverse of `config_dict`.

    Raises:
        TypeError: an unknown or missing field.
    """
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return GCViTConfig(**values)
