"""gcvit-edge: GC ViT on phones, boards, browsers and servers, in INT8, with the accuracy and the speed measured.

from gcvit_edge import create_model, quantize, open_bundle
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gcvit_edge.privacy import disable_telemetry

if TYPE_CHECKING:
    from gcvit_edge.bundle import Bundle as Bundle
    from gcvit_edge.bundle import open_bundle as open_bundle
    from gcvit_edge.export import export_float as export_float
    from gcvit_edge.model.create import create_model as create_model
    from gcvit_edge.model.create import load_model as load_model
    from gcvit_edge.pipeline import quantize as quantize

__version__ = "0.1.0"
__all__ = ["Bundle", "__version__", "create_model", "export_float", "load_model", "open_bundle", "quantize"]

disable_telemetry()

_HOME = {
    "Bundle": "gcvit_edge.bundle",
    "create_model": "gcvit_edge.model.create",
    "export_float": "gcvit_edge.export",
    "load_model": "gcvit_edge.model.create",
    "open_bundle": "gcvit_edge.bundle",
    "quantize": "gcvit_edge.pipeline",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import gcvit_edge` loads nothing heavy (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'gcvit_edge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
