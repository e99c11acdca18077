"""The model card of a bundle."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gcvit_edge.model.info import ModelInfo


def model_card(info: ModelInfo, report: dict[str, Any], requirements: dict[str, dict[str, Any]]) -> str:
    """README.md of a bundle, with the metadata block of Hugging Face model cards."""
    environment = Environment(loader=PackageLoader("gcvit_edge.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("card.md.j2").render(info=info, report=report, requirements=requirements)
