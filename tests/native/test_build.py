"""Building on demand: kept, named after everything that decides it, whole or absent, and errors that say what to do."""

import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.native import build
from gcvit_edge.native.android import build_android_runner
from gcvit_edge.targets import arm64, runner

README = Path(__file__).parents[2] / "README.md"

INSTRUCTIONS = """
    .globl main
main:
    mov w1, #1000
repeat:
    sdot v0.4s, v1.16b, v2.16b
    sdot v0.2s, v1.8b, v2.8b
    sdot v0.4s, v1.16b, v18.4b[3]
    smmla v0.4s, v1.16b, v2.16b
    fmla v0.4s, v1.4s, v2.4s
    fmla v0.4s, v1.4s, v22.s[3]
    udot v0.4s, v1.16b, v2.16b      // from here on none that is counted by name
    ummla v0.4s, v1.16b, v2.16b
    usdot v0.4s, v1.16b, v2.16b
    fmla v0.2d, v1.2d, v2.2d
    fmls v0.4s, v1.4s, v2.4s
    fmla s0, s1, v2.s[1]
    fmadd s0, s1, s2, s3
    subs w1, w1, #1
    b.ne repeat
    mov w0, #0
    ret
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gcvit-edge"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, to be changed."""
    shutil.copytree(build._SOURCES, tmp_path / "sources")
    monkeypatch.setattr(build, "_SOURCES", tmp_path / "sources")
    return tmp_path / "sources"


def needs(missing: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(missing is not None and os.environ.get("CI") != "true", reason=missing or "")


@needs(None if shutil.which("cc") else "needs a C compiler")
def test_what_a_killed_build_left_is_removed(cache: Path) -> None:
    for name in ("unfinished-old", "unfinished-under-way"):
        (cache / name / "made").mkdir(parents=True)
    os.utime(cache / "unfinished-old", (0, 0))
    kept = build.build_counter().parent
    assert {path.name for path in cache.iterdir()} == {"unfinished-under-way", kept.name}


@needs(build.missing_tools(build.host()))
def test_built_once_and_again_when_a_source_changes(cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-Wall -Wextra -Werror")  # here, not where users build: another compiler knows other warnings
    files = build.build_runner()
    made = files.executable.stat().st_mtime_ns
    assert build.build_runner(build.host()) == files
    assert files.executable.stat().st_mtime_ns == made
    assert [path.name for path in cache.iterdir()] == [files.executable.parent.name]  # nothing unfinished is left
    with (sources / "runner.cpp").open("a") as source:
        source.write("// changed\n")
    assert build.build_runner().executable.parent != files.executable.parent


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=needs(build.missing_tools(name))) for name in build.architectures()],
)
def test_runs_on_systems_as_old_as_the_readme_says(architecture: str) -> None:
    said = re.search(r"glibc (\d+)\.(\d+) or later", README.read_text())
    assert said
    newest = {"GLIBC": tuple(map(int, said.groups())), "GLIBCXX": (3, 4, 29)}  # the latter is of GCC 11, which came with such systems
    files = build.build_runner(architecture)
    for file in (files.executable, *files.libraries):
        needed = subprocess.run(["readelf", "--version-info", file], capture_output=True, text=True, check=True).stdout
        versions = re.findall(r"Name: (GLIBC|GLIBCXX)_([\d.]+)", needed)
        assert versions
        assert not [found for found in versions if tuple(map(int, found[1].split("."))) > newest[found[0]]], file.name
    symbols = subprocess.run(["readelf", "--dyn-syms", "--wide", files.executable], capture_output=True, text=True, check=True).stdout
    # for which later headers, of glibc 2.38 and of GCC 13, take symbols that came with them
    assert re.findall(r"\b(?:strto(?:u?ll?|[iu]max)|\w*scanf|_ZSt3cin)\b", symbols) == []


@needs(build.missing_tools(build.host()))
def test_another_compiler_makes_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CXX names it for CMake, also where it is the same file as before."""
    keys: list[tuple[str, ...]] = []
    monkeypatch.setattr(build, "_kept", lambda name, decided_by, make: keys.append(tuple(decided_by)) or tmp_path)
    compiler = tmp_path / "compiler"
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    for release in ("one", "two"):
        compiler.write_text(f"#!/bin/sh\necho {release} $*\n")
        compiler.chmod(0o755)
        build.build_runner()
    assert [key for key in keys[0] if key not in keys[1]] == ["one -O1 --version"]


@needs(build.missing_tools(build.host()))
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-compiler -O1", "needs a C.. compiler, but CXX names no-such-compiler, which is not there; install it, or unset CXX"),
        ("c++ 'x", 'CXX is "c.. \'x", which is no command .No closing quotation.; set it to a C.. compiler, or unset it'),
        ("false", "cannot ask the compiler false for its version: false ended with 1"),
    ],
)
def test_a_compiler_that_is_none(command: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(UserError, match=message):
        build.build_runner()


def test_programs_are_asked_in_english_and_where_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("DESTDIR", "/somewhere")
    said = "[ $LC_ALL = C ] && echo No space left on device || echo Kein Speicherplatz; exit 1"
    with pytest.raises(CheckFailed, match=r"cannot fill the disk: No space left on device; make room"):
        build._run(["sh", "-c", said], "fill the disk")
    assert build._run(["sh", "-c", "echo ${DESTDIR-none}"], "print it") == "none\n"


@needs(build.missing_tools(build.host()))
def test_a_build_that_fails_says_why_and_leaves_nothing(cache: Path, sources: Path) -> None:
    (sources / "runner.cpp").write_text("int main() { return undeclared; }\n")
    with pytest.raises(UserError, match=r"cannot compile the runner: cmake ended with 2:[\s\S]*undeclared"):
        build.build_runner()
    assert list(cache.iterdir()) == []


def test_tools_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"building the runner needs: apt install cmake make g\+\+$"):
        build.build_runner()
    assert build.missing_tools("aarch64") == "building the runner needs: apt install cmake make g++-aarch64-linux-gnu"
    assert arm64.missing("") == build.missing_tools("aarch64")
    with pytest.raises(UserError, match="counting instructions needs a C compiler: apt install gcc"):
        build.build_counter()


@needs(build.missing_tools(build.host()))
def test_without_executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(build, "version", version)
    message = "building the runner needs the package executorch, which is not installed: pip install executorch"
    assert build.missing_tools(build.host()) == runner.missing("") == message
    for make in (build.build_runner, build_android_runner, lambda: build.executorch_package(build.host())):
        with pytest.raises(UserError, match=f"^{message}$"):
            make()


def test_unknown_architecture() -> None:
    with pytest.raises(UserError, match="unknown architecture 'arm64'; did you mean 'aarch64'"):
        build.build_runner("arm64")


def test_a_wheel_that_cannot_be_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch, shadowed: None) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    message = r"cannot download executorch==[\d.]+ for manylinux_2_28_aarch64: .*:\n[\s\S]*No matching distribution found"
    with pytest.raises(UserError, match=message):  # of pip's own, not of a pip.py in the current folder
        build.executorch_package("aarch64")
    assert list(cache.iterdir()) == []


@needs(arm64.missing(""))
def test_counter_counts_exactly(tmp_path: Path) -> None:
    (tmp_path / "program.S").write_text(INSTRUCTIONS)
    compiler = ["aarch64-linux-gnu-g++", "-static", "-march=armv8.6-a", "-o", str(tmp_path / "program"), str(tmp_path / "program.S")]
    subprocess.run(compiler, check=True)
    strict = ["cc", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*strict, build._SOURCES / "count.c"], check=True)
    plugin = f"{build.build_counter()},out={tmp_path / 'counts'}"
    subprocess.run(["qemu-aarch64", "-cpu", "max,sme=off", "-plugin", plugin, tmp_path / "program"], check=True)
    counts = {name: int(count) for name, count in map(str.split, (tmp_path / "counts").read_text().splitlines())}
    total = counts.pop("instructions")
    assert counts == {"sdot": 3000, "smmla": 1000, "fmla": 2000}
    assert 15_000 < total < 100_000  # what starts and ends the program is counted too
