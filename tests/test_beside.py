"""Float artifacts of another process: the same files as of this one, and a failure that says why."""

from contextlib import closing
from pathlib import Path

import pytest
from tiny import make_tiny

from gcvit_edge.beside import FloatArtifacts
from gcvit_edge.bundle.manifest import sha256
from gcvit_edge.errors import CheckFailed
from gcvit_edge.lower import lower_float
from gcvit_edge.model.create import load_model


def test_the_same_files(tmp_path: Path) -> None:
    model, info = load_model(str(make_tiny(tmp_path).weights))
    there, here, work = (tmp_path / name for name in ("there", "here", "work"))
    for folder in (there, here, work):
        folder.mkdir()
    with closing(FloatArtifacts(model, info, ["onnx", "openvino"], there, work)) as beside:
        artifacts = beside.wait()
    assert [artifact.name for artifact in artifacts] == ["onnx.float", "openvino.float"]
    for artifact in artifacts:
        expected = lower_float(artifact.backend, model, info, here)
        assert [file.relative_to(there) for file in artifact.files] == [file.relative_to(here) for file in expected.files]
        assert [sha256(file) for file in artifact.files] == [sha256(file) for file in expected.files]


def test_code_in_the_current_folder_is_not_run(tmp_path: Path, shadowed: None) -> None:
    model, info = load_model(str(make_tiny(tmp_path).weights))
    with closing(FloatArtifacts(model, info, ["onnx"], tmp_path, tmp_path)) as beside:
        assert [artifact.name for artifact in beside.wait()] == ["onnx.float"]


def test_a_failure_says_why(tmp_path: Path) -> None:
    model, info = load_model(str(make_tiny(tmp_path).weights))
    with (
        closing(FloatArtifacts(model, info, ["tensorrt"], tmp_path, tmp_path)) as beside,
        pytest.raises(CheckFailed, match=r"(?s)could not be made \(exit code 1\):.*tensorrt"),
    ):
        beside.wait()


def test_closing_ends_the_process(tmp_path: Path) -> None:
    model, info = load_model(str(make_tiny(tmp_path).weights))
    beside = FloatArtifacts(model, info, ["executorch"], tmp_path, tmp_path)
    beside.close()
    assert beside._process.returncode == -9
