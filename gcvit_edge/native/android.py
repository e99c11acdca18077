"""Builds the runner for Android by Google's NDK and an ExecuTorch that the user has built for Android, for which there are no wheels.

Source: ExecuTorch, scripts/build_android_library.sh, whose first step, with its preset android-arm64-v8a, makes such a build.
"""

import os
import re
from pathlib import Path

from gcvit_edge.errors import UserError
from gcvit_edge.native.build import RunnerFiles, compile_runner, executorch_package, executorch_version, host, missing_programs

ABI = "arm64-v8a"
ARCHITECTURE = "aarch64"  # what `uname -m` says on such a device
PLATFORM = "android-26"  # that of ExecuTorch's own builds
_CONFIG = "lib/cmake/ExecuTorch/executorch-config.cmake"
_VERSION = "include/executorch/runtime/core/version.h"
_LIBRARIES = ("executorch", "extension_module_static", "extension_tensor", "extension_threadpool", "xnnpack_backend", "etdump")


def build_android_runner() -> RunnerFiles:
    """The runner for Android on 64-bit ARM, from the cache if it was built before; it needs no libraries beside it.

    ANDROID_NDK is the folder of the NDK, EXECUTORCH_ANDROID the one into which ExecuTorch was installed (CMAKE_INSTALL_PREFIX).

    Raises:
        UserError: one of them is not set or not such a folder, ExecuTorch's version there is another than here, a tool or
            ExecuTorch itself is missing, or the build fails.
    """
    lacks = missing_programs({"cmake": "cmake", "make": "make"})
    if lacks:
        raise UserError(lacks)
    ndk = _folder("ANDROID_NDK", "the folder of Android's NDK", "build/cmake/android.toolchain.cmake")
    built = _folder("EXECUTORCH_ANDROID", f"the folder into which an ExecuTorch for Android ({ABI}) was installed", _CONFIG)
    absent = [name for name in _LIBRARIES if not list((built / "lib").glob(f"lib{name}.*"))]
    if absent:
        raise UserError(
            f"EXECUTORCH_ANDROID={built} has no {', '.join(absent)}; build ExecuTorch with its preset android-{ABI}, which has XNNPACK, "
            "the extensions module, tensor and threadpool, and devtools"
        )
    options = [
        f"-DCMAKE_TOOLCHAIN_FILE={ndk / 'build/cmake/android.toolchain.cmake'}",
        f"-DANDROID_ABI={ABI}",
        f"-DANDROID_PLATFORM={PLATFORM}",
        f"-DCMAKE_PREFIX_PATH={built}",
        f"-DWHEEL_HEADERS={executorch_package(host()) / 'include'}",
        f"-DBUILT_VERSION={_built_version(built)}",
    ]
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted((built / "lib").iterdir())]
    properties = ndk / "source.properties"  # has the NDK's version
    return compile_runner("android", options, [*options, *stamps, properties.read_text() if properties.is_file() else ""])


def _folder(variable: str, what: str, holds: str) -> Path:
    """The folder that a variable of the environment names; raises UserError if it is not one that holds the file `holds`."""
    value = os.environ.get(variable)
    if not value:
        raise UserError(f"building the runner for Android needs the environment variable {variable}: {what}")
    folder = Path(value).absolute()
    if not (folder / holds).is_file():
        raise UserError(f"{variable}={value} is not {what}: it has no {holds}")
    return folder


def _built_version(built: Path) -> str:
    """The version of an ExecuTorch built from source; raises UserError unless it is this one's, apart from the patch level."""
    header = built / _VERSION
    found = re.search(r'define ET_VERSION "([\d.]+)"', header.read_text()) if header.is_file() else None
    here = executorch_version()
    if found is None or found[1].split(".")[:2] != here.split(".")[:2]:
        there, minor = found[1] if found else "of an unknown version", here.rpartition(".")[0]
        raise UserError(f"EXECUTORCH_ANDROID={built} is ExecuTorch {there}, but {here} makes artifacts; build release {minor} for Android")
    return found[1]
