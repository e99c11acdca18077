"""Paths, and what is in files, that only some machines have: no permission, long names, marks of Windows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command, own
from tiny import Tiny

from gcvit_edge.cli import build_parser
from gcvit_edge.data import read_labels

# root reads everything, unless it gives that up
WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def test_paths_that_cannot_be_used(command: Command, bundle: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert "File name too long; give another path" in command.refuses("predict", bundle, f"{'x' * 300}.png")
    assert "image . is a folder; give a file" in command.refuses("predict", bundle, ".")
    assert "checkpoint . is a folder; give the .safetensors or .pth" in command.refuses("convert", "--weights", ".", "-o", "a.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    dry = ["quantize", *own(tiny), "--dry-run", "-o"]
    assert "cannot write to notes.txt: " in command.refuses(*dry, "notes.txt/bundle")
    assert "cannot write to notes.txt/plots: " in command.refuses("analyze", "-o", "notes.txt/plots")
    (tmp_path / "bad.zip").write_bytes(b"PK\x05\x06" + bytes(18)[:-2] + b"\0\0")
    assert "bad.zip exists; give another --output" in command.refuses(*dry, "bad.zip")


def test_what_may_not_be_read(bundle: Path, tiny: Tiny, tmp_path: Path) -> None:
    images = Path(shutil.copytree(tiny.evaluation, tmp_path / "images"))
    locked = next(path for path in images.iterdir() if path.is_dir())
    file = next(locked.iterdir())
    locked.chmod(0)
    try:
        for argv in (["predict", bundle, file], ["evaluate", bundle, "--data", images], ["verify", locked / "bundle"]):
            command = [*WITHOUT_PRIVILEGES, sys.executable, "-m", "gcvit_edge", *map(str, argv)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith(f"error: {locked}"), done.stderr
            assert done.stderr.endswith("Permission denied; give another path\n")
    finally:
        locked.chmod(0o700)


def test_what_may_not_be_written_is_not_trained_for(tiny: Tiny, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    train = ["train", "--data", tiny.calib, "--weights", tiny.weights, "--device", "cpu", "-o", locked / "mine.safetensors"]
    command = [*WITHOUT_PRIVILEGES, sys.executable, "-m", "gcvit_edge", *map(str, train)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "no permission to write to" in done.stderr
    assert "epoch" not in done.stderr


@pytest.mark.parametrize("verb", ["benchmark", "evaluate", "analyze"])
def test_a_bundle_may_follow_a_backend(verb: str) -> None:
    more = ["--data", "."] if verb == "evaluate" else []
    arguments = build_parser().parse_args([verb, *more, "--backend", "onnx", "--backend", "openvino", "BUNDLE"])
    assert arguments.backend == ["onnx", "openvino"]
    assert str(arguments.bundle) == "BUNDLE"


def test_a_mark_of_windows_before_a_text_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("\ufeffdaisy\r\ntulip\r\n".encode())
    assert read_labels(tmp_path / "labels.txt").names == ("daisy", "tulip")
