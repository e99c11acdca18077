"""profile: where the time of an artifact goes."""

from pathlib import Path

import pytest
from commands import Command

from gcvit_edge.bundle import Bundle


def test_profile(command: Command, bundle: Path) -> None:
    outcome = command("profile", bundle, "--backend", "onnx", "--threads", 1)
    assert outcome.code == 0, outcome.err
    assert "linears, convolutions, attention" in outcome.out
    assert "x as fast as float" in outcome.out
    report = command("profile", bundle, "--backend", "onnx", "--threads", 1, "--json").json
    assert list(report["profiles"]) == ["float", "int8"]
    assert [profile["delegated_share"] for profile in report["profiles"].values()] == [None, None]


@pytest.mark.parametrize("present", [True, False])
def test_profile_says_when_the_cpu_has_no_int8_products(
    present: bool, command: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcvit_edge.measurement.profile.without_int8_products", lambda backends: None if present else "This CPU has none.")
    report = command("profile", bundle, "--backend", "onnx", "--threads", 1, "--json").json
    assert (report["verdict"][-1] == "This CPU has none.") is not present


def test_profile_refuses_an_unknown_backend(command: Command, bundle: Path) -> None:
    assert "the bundle has no artifact of backend 'tflite'; it has onnx" in command.refuses("profile", bundle, "--backend", "tflite")


def test_profile_refuses_what_is_no_etdump(command: Command, pte_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "text.etdump").write_text("hello")
    message = command.refuses("profile", pte_bundle.root, "--backend", "executorch", "--etdump", "text.etdump")
    assert "text.etdump is no ETDump" in message
