"""RAPL, read from a folder laid out as the kernel does it."""

from pathlib import Path

from gcvit_edge.targets._energy import Rapl


def domain(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    path = root / folder
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path / "energy_uj"


def test_joules_of_every_domain(tmp_path: Path) -> None:
    package, core = domain(tmp_path, "intel-rapl:0", "package-0", 100), domain(tmp_path, "intel-rapl:0:0", "core", 40)
    meter = Rapl(tmp_path)
    before = meter.read()
    package.write_text("500100\n")
    core.write_text("250040\n")
    assert meter.since(before) == {"package-0": 0.5, "package-0/core": 0.25}


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 999_000, range_uj=999_999)
    meter = Rapl(tmp_path)
    before = meter.read()
    counter.write_text("2000\n")
    assert meter.since(before) == {"package-0": 0.003}


def test_what_cannot_be_read_is_absent(tmp_path: Path) -> None:
    domain(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl").mkdir()
    domain(tmp_path, "intel-rapl:1", "package-1", 1)
    assert set(Rapl(tmp_path).read()) == {"package-1"}
    assert Rapl(tmp_path / "none").read() == {}
    assert Rapl(tmp_path / "none").since({}) == {}


def test_a_counter_that_goes_meanwhile(tmp_path: Path) -> None:
    goes, stays = domain(tmp_path, "intel-rapl:0", "package-0", 1), domain(tmp_path, "intel-rapl:1", "package-1", 1)
    meter = Rapl(tmp_path)
    before = meter.read()
    goes.unlink()
    stays.write_text("500001\n")
    assert meter.since(before) == {"package-1": 0.5}
