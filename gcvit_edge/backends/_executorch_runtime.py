"""ExecuTorch's Python runtime without its exporter: 1 s to import instead of 3.6."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

_EXPORTER = "executorch.exir"


@contextmanager
def without_exporter() -> Iterator[None]:
    """Inside, `executorch.runtime` can be imported without `executorch.exir`, from which it takes one decorator, and whose `__init__` loads
    all that makes .pte files, torch._dynamo and torch._inductor too. The package is an empty one meanwhile, unless it is loaded already;
    afterwards it can be imported as ever."""
    package = find_spec("executorch")
    if package is None or _EXPORTER in sys.modules:
        yield
        return
    empty = ModuleType(_EXPORTER)
    empty.__path__ = [f"{folder}/exir" for folder in package.submodule_search_locations or ()]
    sys.modules[_EXPORTER] = empty
    try:
        yield
    finally:
        del sys.modules[_EXPORTER]
