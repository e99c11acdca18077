"""The files of ONNX Runtime Web: kept in the user's cache, fetched only when asked for, and used only if they are the known ones."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from gcvit_edge.errors import UserError

VERSION = "1.30.0"
_FILES = {  # of dist/ in the npm package onnxruntime-web, MIT licence
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_FETCH = "python -m gcvit_edge.targets.web"


def cache_folder() -> Path:
    """Where the files are kept, below $XDG_CACHE_HOME or ~/.cache."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("gcvit-edge")) / f"onnxruntime-web-{VERSION}"


def missing_runtime() -> str | None:
    """What to do if the files are not there or not the known ones; None if they are."""
    folder = cache_folder()
    for name, expected in _FILES.items():
        if not (folder / name).is_file():
            return f"onnxruntime-web {VERSION} is not in {folder}; fetch it (33 MB, by npm) with `{_FETCH}`"
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            return f"{folder / name} has sha256 {found[:12]}..., expected {expected[:12]}...; fetch it again with `{_FETCH}`"
    return None


def runtime_files() -> dict[str, Path]:
    """The files by the names that the page knows them by."""
    module, wasm = (cache_folder() / name for name in _FILES)
    return {"ort.mjs": module, "ort.wasm": wasm}


def fetch_runtime() -> Path:
    """Fetches the package by npm, without running any of its scripts, and keeps the two files; returns their folder.

    Raises:
        UserError: npm is missing or fails, or the package is not the known one; nothing is kept then.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "npm is not on PATH; install it (on Debian: apt install npm), or copy "
            f"{' and '.join(_FILES)} of onnxruntime-web {VERSION} to {cache_folder()}"
        )
    with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as folder:
        done = subprocess.run([npm, "pack", "--ignore-scripts", "--loglevel=error", f"onnxruntime-web@{VERSION}"],
                              cwd=folder, capture_output=True, text=True, check=False)  # fmt: skip
        package = Path(folder) / f"onnxruntime-web-{VERSION}.tgz"
        if done.returncode or not package.is_file():
            raise UserError(f"npm could not fetch onnxruntime-web {VERSION}; check its settings and the network:\n{done.stderr.strip()}")
        contents = unpack(package)
    cache_folder().mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (cache_folder() / name).write_bytes(content)
    return cache_folder()


def unpack(package: Path) -> dict[str, bytes]:
    """The two files of an npm package.

    Raises:
        UserError: it does not have them, or they are not the known ones.
    """
    contents = {}
    try:
        with tarfile.open(package) as archive:
            for name in _FILES:
                file = archive.extractfile(f"package/dist/{name}")
                contents[name] = file.read() if file else b""
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise UserError(f"{package.name} is no package of onnxruntime-web {VERSION} ({error}); check npm's settings") from error
    for name, expected in _FILES.items():
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise UserError(
                f"{name} of {package.name} has sha256 {found[:12]}..., expected {expected[:12]}...; "
                "npm gave another package than was published: do not use it"
            )
    return contents
