"""The file name is the registry: a backend, target or verb is a module of its package, imported only when asked for."""

import importlib
import pkgutil
from types import ModuleType

from gcvit_edge.errors import UserError, unknown_name


def module_names(package: ModuleType) -> list[str]:
    """Names of the public modules of a package, without importing them."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load_module(package: ModuleType, kind: str, name: str) -> ModuleType:
    """The module `name` of `package`; `kind` is what error messages call it.

    Raises:
        UserError: no such module (the message names the nearest one), or a package that it needs is not installed.
    """
    known = module_names(package)
    if name not in known:
        raise unknown_name(kind, name, known)
    try:
        return importlib.import_module(f"{package.__name__}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gcvit_edge"):
            raise
        raise UserError(f"{kind} {name!r} needs the package {error.name!r}, which is not installed: pip install {error.name}") from error
