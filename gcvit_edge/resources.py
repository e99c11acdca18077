"""Where the recipes and the embedded sample lie: in the installed package, or at the root of a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource_dir(name: str) -> Path:
    """Folder `recipes` or `calib`.

    Raises:
        FileNotFoundError: the installation is broken.
    """
    for folder in (_PACKAGE / "_resources" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the folder {name!r} is missing from the installation of gcvit-edge; install it again")
