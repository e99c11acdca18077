"""The runner for Android, as far as it can be built without Google's NDK: by a toolchain file and an ExecuTorch that stand in for it.

The toolchain takes the variables of Android's and compiles by Debian's cross compiler. The ExecuTorch has the targets of a build from
source, by their names there, whose libraries are those of the wheel for ARM. So what runs here is Linux's, not bionic's.
"""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from gcvit_edge.bundle import Bundle
from gcvit_edge.cli import main
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.native import build
from gcvit_edge.native.android import build_android_runner
from gcvit_edge.targets import adb, arm64
from gcvit_edge.targets._process import LocalFolder, ProcessSession

TOOLCHAIN = """
if(NOT "${ANDROID_ABI} ${ANDROID_PLATFORM}" STREQUAL "arm64-v8a android-26")
  message(FATAL_ERROR "ABI and platform are ${ANDROID_ABI} ${ANDROID_PLATFORM}")
endif()
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ANDROID_ABI ANDROID_PLATFORM)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
"""
CONFIG = """
set(root "${CMAKE_CURRENT_LIST_DIR}/../../..")
set(EXECUTORCH_INCLUDE_DIRS ${root}/include ${root}/include/executorch/runtime/core/portable_type/c10 ${root}/lib)
function(provide target library)
  add_library(${target} SHARED IMPORTED)
  set_target_properties(${target} PROPERTIES
    IMPORTED_LOCATION "${root}/lib/lib${target}.so" INTERFACE_INCLUDE_DIRECTORIES "${root}/include"
    INTERFACE_COMPILE_DEFINITIONS "C10_USING_CUSTOM_GENERATED_MACROS;ET_EVENT_TRACER_ENABLED"
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
endfunction()
foreach(target executorch extension_module_static extension_tensor extension_threadpool xnnpack_backend etdump)
  provide(${target} ${target})
endforeach()
"""
# libraries of the wheel, by the targets of a build from source that they stand for
LIBRARIES = {
    "executorch": "executorch", "extension_module_static": "executorch", "extension_tensor": "executorch",
    "extension_threadpool": "executorch_threadpool", "xnnpack_backend": "executorch_backend_xnnpack", "etdump": "executorch_etdump",
}  # fmt: skip

needs_arm = pytest.mark.skipif(arm64.missing("") is not None and os.environ.get("CI") != "true", reason=arm64.missing("") or "")


@pytest.fixture
def ndk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands in for the NDK."""
    toolchain = tmp_path / "ndk" / "build" / "cmake" / "android.toolchain.cmake"
    toolchain.parent.mkdir(parents=True)
    toolchain.write_text(TOOLCHAIN)
    monkeypatch.setenv("ANDROID_NDK", str(tmp_path / "ndk"))
    return tmp_path / "ndk"


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands in for an installed ExecuTorch for Android."""
    folder = tmp_path / "cmake-out-android-arm64-v8a"
    (folder / "lib" / "cmake" / "ExecuTorch").mkdir(parents=True)
    (folder / "lib" / "cmake" / "ExecuTorch" / "executorch-config.cmake").write_text(CONFIG)
    core = folder / "include" / "executorch" / "runtime" / "core"
    core.mkdir(parents=True)
    (core / "version.h").write_text(f'#define ET_VERSION "{version("executorch").rpartition(".")[0]}.7"\n')
    for name in LIBRARIES:
        (folder / "lib" / f"lib{name}.so").touch()
    monkeypatch.setenv("EXECUTORCH_ANDROID", str(folder))
    return folder


@needs_arm
def test_built_and_run(ndk: Path, built: Path, pte_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = build.executorch_package("aarch64") / "lib"
    for name, library in LIBRARIES.items():
        shutil.copy(libraries / f"lib{library}.so", built / "lib" / f"lib{name}.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = build_android_runner()
    assert files.libraries == ()
    assert adb._build("aarch64") == files.executable == build_android_runner().executable
    artifact, images = pte_bundle.artifact("executorch"), pte_bundle.golden_input()
    emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "cortex-a76", "-E", f"LD_LIBRARY_PATH={libraries}"]
    session = ProcessSession(artifact, [*emulator, str(files.executable), str(artifact.path), "1"], LocalFolder())
    with session:
        assert session.runtime_version == version("executorch").rpartition(".")[0] + ".7"
        assert sqnr_db(session.infer(images, lambda: None), pte_bundle.golden_logits(artifact)) > 100
        assert len(session.time(images[:1].astype(np.float32), 2).ms) == 2
    (built / "lib" / "libetdump.so").touch()
    assert build_android_runner().executable != files.executable  # another ExecuTorch, another runner


@needs_arm
def test_a_build_that_fails_says_why(ndk: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot compile the runner: cmake ended with 2:[\s\S]*undefined reference"):
        build_android_runner()  # its libraries are empty files
    (ndk / "build" / "cmake" / "android.toolchain.cmake").write_text('message(FATAL_ERROR "no such platform")\n')
    with pytest.raises(UserError, match=r"cannot configure the runner: cmake ended with 1:[\s\S]*no such platform"):
        build_android_runner()
    assert list((tmp_path / "cache" / "gcvit-edge").iterdir()) == []


def test_what_is_not_given(ndk: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            build_android_runner()

    (built / "include" / "executorch" / "runtime" / "core" / "version.h").write_text('#define ET_VERSION "0.6.0"\n')
    refused(r"EXECUTORCH_ANDROID=.* is ExecuTorch 0\.6\.0, but [\d.]+ makes artifacts; build release \d+\.\d+ for Android")
    (built / "include" / "executorch" / "runtime" / "core" / "version.h").unlink()
    refused("is ExecuTorch of an unknown version")
    (built / "lib" / "libetdump.so").unlink()
    refused("EXECUTORCH_ANDROID=.* has no etdump; build ExecuTorch with its preset android-arm64-v8a")
    monkeypatch.setenv("EXECUTORCH_ANDROID", str(tmp_path))
    refused("EXECUTORCH_ANDROID=.* is not the folder into which .* it has no lib/cmake/ExecuTorch/executorch-config.cmake")
    monkeypatch.delenv("EXECUTORCH_ANDROID")
    refused("needs the environment variable EXECUTORCH_ANDROID: the folder into which an ExecuTorch for Android")
    monkeypatch.setenv("ANDROID_NDK", str(tmp_path))
    refused("ANDROID_NDK=.* is not the folder of Android's NDK: it has no build/cmake/android.toolchain.cmake")
    monkeypatch.delenv("ANDROID_NDK")
    refused("needs the environment variable ANDROID_NDK: the folder of Android's NDK$")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("building the runner needs: apt install cmake make$")


def test_what_adb_and_the_command_line_say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ANDROID_NDK", raising=False)
    with pytest.raises(UserError, match=r"needs the environment variable ANDROID_NDK: .*; or give a runner that is built for Android with"):
        adb._build("aarch64")
    with pytest.raises(UserError, match="the runner for Android is built for aarch64, not for armv7l; give one with --runner"):
        adb._build("armv7l")
    assert main(["build-runner", "--arch", "android"]) == 2
    assert "ANDROID_NDK" in capfd.readouterr().err
