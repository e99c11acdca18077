"""Everything in a bundle that is not an artifact: golden tensors, labels, preprocessing, report, model card, manifest."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge import __version__
from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import load_backend, package_version
from gcvit_edge.bundle.manifest import (
    FORMAT_VERSION,
    GOLDEN_IMAGE,
    GOLDEN_INPUT,
    GOLDEN_PREPROCESSED,
    File,
    Manifest,
    RecipeCopy,
    Role,
    describe_file,
    golden_output,
    write_manifest,
)
from gcvit_edge.data import draw_chart, read_image
from gcvit_edge.measurement.accuracy import Logits
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.report.card import model_card


def pack(
    stage: Path,
    info: ModelInfo,
    artifacts: Mapping[Artifact, Logits],
    golden: NDArray[np.float32],
    report: dict[str, Any],
    recipe: RecipeCopy | None,
) -> None:
    """Completes the folder `stage`, which holds the artifacts; bundle.json comes last.

    artifacts: each with its golden output, its own runtime's logits (N, classes) for `golden`, network inputs (N, C, H, W).
    """
    files: list[File] = []
    for artifact in artifacts:
        files.append(describe_file(stage, artifact.path, "artifact", artifact))
        files += [describe_file(stage, path, "artifact_data", artifact) for path in artifact.files[1:]]
    (stage / GOLDEN_INPUT).parent.mkdir()
    np.save(stage / GOLDEN_INPUT, golden)
    draw_chart().save(stage / GOLDEN_IMAGE)
    np.save(stage / GOLDEN_PREPROCESSED, read_image(stage / GOLDEN_IMAGE, info.preprocessing))
    files += [describe_file(stage, stage / name, "golden") for name in (GOLDEN_INPUT, GOLDEN_IMAGE, GOLDEN_PREPROCESSED)]
    for artifact, logits in artifacts.items():
        np.save(stage / golden_output(artifact), logits)
        files.append(describe_file(stage, stage / golden_output(artifact), "golden", artifact))
    shipped = {artifact.path.relative_to(stage).as_posix(): artifact for artifact in artifacts}
    requirements = {artifact.backend: load_backend(artifact.backend).requirements(artifact.path) for artifact in artifacts}
    texts: list[tuple[str, Role, str]] = [
        ("labels.txt", "labels", "".join(f"{name}\n" for name in info.labels.names)),
        ("preprocessor_config.json", "preprocessing", _json(info.preprocessing.to_huggingface())),
        ("report.json", "report", _json(report)),
        ("README.md", "card", model_card(info, report, shipped, requirements)),
    ]
    for name, role, text in texts:
        (stage / name).write_text(text, encoding="utf-8")
        files.append(describe_file(stage, stage / name, role))
    packages = sorted({package for artifact in artifacts for package in load_backend(artifact.backend).PACKAGES})
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=info,
        recipe=recipe,
        files=tuple(files),
        requirements=requirements,
        tools={"gcvit-edge": __version__, "python": platform.python_version()} | {name: package_version(name) for name in packages},
        results=report["artifacts"],
        within_limits=all(entry["within_limits"] for entry in report["artifacts"]) if recipe else None,
    )
    write_manifest(stage, manifest)


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
