"""Saved training runs: one file, replaced as a whole, so that an interruption leaves the last state and never half of one."""

from pathlib import Path
from typing import Any

import torch

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.model.checkpoint import DAMAGED_PICKLE
from gcvit_edge.paths import require_folder, written_whole


def state_beside(output: Path) -> Path:
    """Where the run that makes `output` is saved."""
    return output.with_name(output.name + ".run")


def check_state(path: Path, resume: bool, force: bool) -> None:
    """Refuses to resume nothing, to lose an interrupted run without `force`, and a place where none can be saved.

    Raises:
        UserError: one of these.
    """
    require_folder(path.parent)
    if path.is_dir():
        raise UserError(f"the run is saved to {path} while it goes on, which is a folder; move it away, or choose another --output")
    if resume and not path.is_file():
        raise UserError(f"nothing to resume: {path} does not exist; start without --resume")
    if not force and not resume and path.exists():
        raise UserError(f"{path} is an interrupted run; give --resume to continue it, or --force to start again")


def write_state(path: Path, identity: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes the `content` of a run (tensors and plain values) with the `identity` that `read_state` asks for.

    Raises:
        CheckFailed: the disk does not take it.
    """
    try:
        with written_whole(path) as partial:
            torch.save({"identity": identity, "content": content}, partial)
    except (OSError, RuntimeError) as error:
        raise CheckFailed(f"cannot save the run to {path}: {error}; see to that (is there room?), then --resume") from error


def read_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The content that `write_state` wrote for the same identity.

    Raises:
        UserError: there is no such file, it is damaged, or it is of another run; the message says what differs.
    """
    if not path.is_file():
        raise UserError(f"nothing to resume: {path} does not exist; start without --resume")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found, content = saved["identity"], saved["content"]
    except DAMAGED_PICKLE as error:
        raise UserError(f"{path} is no saved run, or a damaged one ({error}); start again with --force") from error
    before, now = _flat(found), _flat(identity)
    differing = [f"{key} was {before.get(key)}, is {now.get(key)}" for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        raise UserError(f"{path} is of another run: {'; '.join(differing)}; resume what was started, or start again with --force")
    return content


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= {f"{key}.{inner}": v for inner, v in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat
