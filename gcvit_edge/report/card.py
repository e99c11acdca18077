"""The model card of a bundle."""

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from gcvit_edge.artifact import Artifact
from gcvit_edge.model.info import ModelInfo


def model_card(info: ModelInfo, report: dict[str, Any], files: Mapping[str, Artifact], requirements: dict[str, dict[str, Any]]) -> str:
    """README.md of a bundle, with the metadata block of Hugging Face model cards. files: what ships, by its path in the bundle."""
    environment = Environment(loader=PackageLoader("gcvit_edge.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("card.md.j2").render(
        info=info, report=report, files=files, requirements=requirements, licence=_licence(info.origin.licence)
    )


def _licence(text: str) -> str:
    """What the metadata block says: an SPDX identifier in lower case, "unknown", or "other".

    Source: Hugging Face Hub documentation, "Model Cards", on `license` and `license_name`.
    """
    name = text.partition(" (")[0]  # what follows in brackets is our word on it
    is_known = re.fullmatch(r"[A-Za-z0-9.+-]*\d[A-Za-z0-9.+-]*|MIT|Unlicense|unknown", name)
    return name.lower() if is_known else "other"
