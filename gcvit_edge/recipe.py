"""Recipes: what to quantize, how to calibrate, and the accuracy that the result must keep. One YAML file each."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gcvit_edge.artifact import INTEGER_ACTIVATIONS, Precision
from gcvit_edge.errors import unknown_name
from gcvit_edge.resources import resource_dir
from gcvit_edge.schema import Section, parse_yaml, read_text
from gcvit_edge.training.settings import QatSettings

Operator = Literal["linear", "conv", "attention", "residual"]
X86 = Literal["vnni", "avx2"]
"""x86 CPUs by how they multiply integers: with dot products of bytes, of any width, or by 16-bit multiply-add."""

RangeMethod = Literal["minmax", "average", "percentile", "mse", "entropy"]

MIN_CALIBRATION_IMAGES = 16  # fewer leave the ranges to chance
_HALVES = ("fp16", "bf16")
_FOR_INTEGERS = ("centering", "smoothing", "equalization")


class Calibration(Section):
    """Which images set the activation ranges."""

    images: int = Field(128, ge=MIN_CALIBRATION_IMAGES, strict=True, description="how many, spread evenly over the classes")
    seed: int = Field(0, ge=0, strict=True, description="which ones")
    ranges: RangeMethod = Field("minmax", description="how a range follows from what was seen; see quantization/ranges.py")
    unit_softmax: bool = Field(False, description="the output of the softmax has the range 0 to 1 (a fixed scale), whatever was seen")


class Search(Section):
    """Choosing the layers that stay float so that the drop is within `limits`: see gcvit_edge/search.py."""

    images: int = Field(2000, ge=50, strict=True, description="at most, of those that calibration does not use; they judge the drop")
    ranked_by: int = Field(16, ge=1, strict=True, description="of these, the images that rank the layers")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.ranked_by > self.images:
            raise ValueError(f"`ranked_by` is a number of the `images`, of which there are {self.images}, got {self.ranked_by}")
        return self


class Limits(Section):
    """Accuracy that every artifact must keep against float, on the evaluation images."""

    max_drop: float = Field(0.5, ge=-100, le=100, description="top-1 drop in percentage points")
    min_agreement: float = Field(0.985, ge=0, le=1, description="fraction of images with the same top-1 class")


class Recipe(Section):
    """A quantization recipe; see recipes/int8_ptq.yaml for what each key means to each backend."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    description: str
    precision: Precision = "int8"
    operators: tuple[Operator, ...] = Field(("linear", "conv"), min_length=1)
    backends: tuple[str, ...] = Field(("executorch", "openvino", "onnx"), min_length=1)
    x86: X86 = Field("vnni", description="the x86 CPUs that artifacts are to be fast on; they run, and are as exact, on the others too")
    centering: bool = Field(True, description="channels of keys and values around 0; see quantization/centering.py")
    smoothing: bool = Field(True, description="outlier channels smaller, their weights larger; see quantization/smoothing.py")
    equalization: bool = Field(True, description="channels of outputs to one range; see quantization/equalization.py")
    rounding: Literal["nearest", "adaptive", "sequential"] = Field(
        "nearest",
        description="of weights; adaptive: for least error of a layer's outputs (GPTQ); sequential: the layers' before it included (GPTAQ)",
    )
    bias_correction: bool = Field(False, description="the mean error of weights rounded to the nearest goes into biases")
    keep_float: tuple[str, ...] = Field((), description="layers that stay float: names of the deploy form, or patterns such as stages.0.*")
    search: Search | None = Field(None, description="which more stay float is searched; without this section, none")
    calibration: Calibration = Calibration()  # type: ignore[call-arg]
    qat: QatSettings | None = Field(None, description="fine-tuning after calibration; without this section there is none")
    limits: Limits = Limits()  # type: ignore[call-arg]

    @model_validator(mode="before")
    @classmethod
    def _without_integers(cls, data: Any) -> Any:
        """What makes channels fit for integers is off by default where there are none."""
        return dict.fromkeys(_FOR_INTEGERS, False) | data if data.get("precision") in _HALVES else data

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.precision in _HALVES and (wanted := [key for key in _FOR_INTEGERS if getattr(self, key)]):
            raise ValueError(f"`{wanted[0]}` makes channels fit for integers, which {self.precision} has none of; leave it out")
        if self.calibration.ranges != "minmax" and self.precision not in INTEGER_ACTIVATIONS:
            raise ValueError(f"`calibration.ranges` is for activations in integers, which {self.precision} leaves in float; leave it out")
        if self.rounding != "nearest" and not {"linear", "conv"} & set(self.operators):
            raise ValueError(f"`rounding: {self.rounding}` is for linears and convolutions, not for {self._contents()}; leave it out")
        if self.rounding == "sequential" and self.search is not None:
            raise ValueError(
                "`rounding: sequential` fits layers to rounded ones before them, of which `search` leaves some in float; take "
                "`rounding: adaptive`, or leave out `search`"
            )
        if self.bias_correction and (self.precision in _HALVES or "linear" not in self.operators):
            raise ValueError(f"`bias_correction` is for linears in integers, not for {self._contents()}; leave it out")
        if self.bias_correction and self.rounding != "nearest":
            raise ValueError(f"`rounding: {self.rounding}` leaves no mean error for `bias_correction`; leave out the one or the other")
        activations = sorted({"attention", "residual"} & set(self.operators))
        if activations and self.precision not in INTEGER_ACTIVATIONS:
            raise ValueError(
                f"`operators`: {', '.join(activations)} rounds activations, which {self.precision} leaves in float; leave it out"
            )
        if self.x86 == "avx2" and (self.precision != "int8" or "linear" not in self.operators):
            raise ValueError(f"`x86: avx2` is for linears in INT8, not for {self._contents()}; leave it out")
        if self.calibration.unit_softmax and "attention" not in self.operators:
            raise ValueError(
                f"`calibration.unit_softmax` is for the softmax in integers, not for {self._contents()}; leave it out, or add `attention` "
                "to `operators`"
            )
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if self.qat is not None and self.precision != "int8":
            raise ValueError(f"`qat` trains INT8, and the precision is {self.precision}; leave out the one or change the other")
        if self.qat is not None and (self.keep_float or self.search is not None):
            raise ValueError("`qat` trains every layer in INT8; leave out `keep_float` and `search`, or `qat`")
        if self.qat is not None and self.bias_correction:
            raise ValueError("`qat` trains biases too; leave out `bias_correction`, or `qat`")
        if self.qat is not None and self.rounding != "nearest":
            raise ValueError(f"`qat` trains weights as they are rounded to the nearest; leave out `rounding: {self.rounding}`, or `qat`")
        if self.qat is not None and self.calibration.unit_softmax:
            raise ValueError("`qat` trains the range of the softmax too; leave out `calibration.unit_softmax`, or `qat`")
        return self

    def _contents(self) -> str:
        return f"{', '.join(self.operators)} in {self.precision}"


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
    elif name_or_file in recipe_names():
        path = resource_dir("recipes") / f"{name_or_file}.yaml"
    else:
        raise unknown_name("recipe", name_or_file, recipe_names())
    return read_text(path, "recipe")


def parse_recipe(text: str, source: str) -> Recipe:
    """Validates the YAML of a recipe; `source` is how error messages call it.

    Raises:
        UserError: not YAML, an unknown key (the message names the nearest valid one) or a value of the wrong kind.
    """
    return parse_yaml(Recipe, text, f"recipe {source}")
