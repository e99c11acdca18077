"""Results of hours of measuring, in a file."""

import json
from pathlib import Path
from typing import Any

from gcvit_edge.paths import written_whole


def save(entries: list[dict[str, Any]], file: Path) -> None:
    """Writes all of them, or leaves what is there."""
    with written_whole(file) as partial:
        partial.write_text(json.dumps(entries, indent=2) + "\n")
