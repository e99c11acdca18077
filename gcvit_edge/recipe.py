"""Recipes: what to quantize, how to calibrate, and the accuracy that the result must keep. One YAML file each."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gcvit_edge.errors import UserError, nearest, unknown_name
from gcvit_edge.resources import resource_dir

Operator = Literal["linear", "conv", "attention", "residual"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(_Section):
    """Which images set the activation ranges."""

    images: int = Field(128, ge=1, strict=True, description="how many, spread evenly over the classes")
    seed: int = Field(0, strict=True, description="which ones")


class Limits(_Section):
    """Accuracy that every artifact must keep against float, on the evaluation images."""

    max_drop: float = Field(0.5, description="top-1 drop in percentage points")
    min_agreement: float = Field(0.985, ge=0, le=1, description="fraction of images with the same top-1 class")


class Recipe(_Section):
    """A quantization recipe; see recipes/int8_ptq.yaml for what each key means to each backend."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    description: str
    precision: Literal["int8"] = "int8"
    operators: tuple[Operator, ...] = Field(("linear", "conv"), min_length=1)
    backends: tuple[str, ...] = Field(("executorch", "openvino", "onnx"), min_length=1)
    calibration: Calibration = Calibration()  # type: ignore[call-arg]
    limits: Limits = Limits()  # type: ignore[call-arg]


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in resource_dir("recipes").glob("*.yaml"))


def recipe_text(name_or_file: str) -> str:
    """The YAML of a named recipe, or of a file that ends in .yaml or .yml.

    Raises:
        UserError: no such recipe or file; the message names the nearest recipe.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        path = Path(name_or_file)
        if not path.is_file():
            raise UserError(f"recipe file {name_or_file} does not exist")
    elif name_or_file in recipe_names():
        path = resource_dir("recipes") / f"{name_or_file}.yaml"
    else:
        raise unknown_name("recipe", name_or_file, recipe_names())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}; give a YAML text file in UTF-8") from error


def parse_recipe(text: str, source: str) -> Recipe:
    """Validates the YAML of a recipe; `source` is how error messages call it.

    Raises:
        UserError: not YAML, an unknown key (the message names the nearest valid one) or a value of the wrong kind.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {source} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"recipe {source} must be a mapping of keys to values, got {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(detail)}" for detail in error.errors())
        raise UserError(f"recipe {source} is not valid:\n{problems}") from None


def _explain(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _keys_beside(detail["loc"])
        guess = nearest(str(detail["loc"][-1]), known)
        hint = f"did you mean {guess!r}?" if guess else f"valid keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if detail["type"] == "missing":
        return f"key {where!r} is missing"
    return f"{where}: got {detail['input']!r}; {detail['msg']}"


def _keys_beside(location: tuple[str | int, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return list(section.model_fields)
