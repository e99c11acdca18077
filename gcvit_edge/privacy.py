"""No telemetry leaves the user's machine through us: each runtime's own switch, set before it is imported."""

import os
import sys


def disable_telemetry() -> None:
    """Switches off the telemetry of ONNX Runtime, OpenVINO, NNCF and huggingface_hub in this process and its children.

    OpenVINO has no environment switch, but falls back to a stub when its telemetry package cannot be imported. A runtime
    that was imported before gcvit_edge is not affected.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("NNCF_CI", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
