"""Which devices a request means: targets by name and address, or names from a devices.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from gcvit_edge.errors import UserError, unknown_name
from gcvit_edge.paths import is_full
from gcvit_edge.schema import load_yaml
from gcvit_edge.targets import load_target, parse_target, target_names


@dataclass(frozen=True)
class Device:
    """name: for people. options: an `Options` of the target. threads: None is all CPUs of the device."""

    name: str
    target: str
    address: str
    options: Any
    threads: int | None


def names_target(name: str) -> bool:
    """Whether this is a target, with an address or without."""
    return name.partition(":")[0] in target_names()


def find_devices(names: Sequence[str], file: Path | None, threads: int | None, options: dict[str, Any]) -> list[Device]:
    """The device of each name: an entry of `file` (None: there is none), or a target such as `local` or `ssh:pi@board`.

    threads and options (by name) hold for every device that takes them, and go before those in the file.

    Raises:
        UserError: an unknown device or target, a target that cannot be used here (the message says what to install), an option
            that no device takes or whose value is wrong, a folder that cannot be written, or fewer than one thread.
    """
    entries = read_devices(file) if file else {}
    for name in names:
        if name not in entries and not names_target(name):
            raise unknown_name("device or target", name, [*entries, *target_names()])
    settings = [entries.get(name, {"target": name}) for name in names]
    takes = [{field.name for field in fields(load_target(parse_target(each["target"])[0]).Options)} for each in settings]
    unused = set(options).difference(*takes)
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused))
        raise UserError(f"{flags}: none of the targets {', '.join(names)} has this option; remove it")
    given = [{key: value for key, value in options.items() if key in known} for known in takes]
    for each in given if threads is not None else []:
        each["threads"] = threads
    return [_device(name, entry | own) for name, entry, own in zip(names, settings, given, strict=True)]


def read_devices(file: Path) -> dict[str, dict[str, Any]]:
    """Reads a devices.yaml: by device name, the `target`, and optionally `threads` and options of that target.

    Raises:
        UserError: not readable, not of that form, or a device has the name of a target or one that no folder can have.
    """
    try:
        entries = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read devices file {file}: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(e, dict) and isinstance(e.get("target"), str) for e in entries.values()):
        raise UserError(f"{file} is no devices file; write `NAME: {{target: ssh:pi@board, threads: 4}}`, one line a device")
    for name in filter(names_target, map(str, entries)):
        raise UserError(f"{file} gives the name {name!r} to a device, but that is a target; give the device another name")
    for name in {".", "..", ""}.intersection(map(str, entries)):  # folders of devices have their names
        raise UserError(f"{file} gives the name {name!r} to a device, which no folder can have; give the device another name")
    return {str(name): entry for name, entry in entries.items()}


def _device(name: str, entry: dict[str, Any]) -> Device:
    target, address = parse_target(entry["target"])
    module = load_target(target)
    options = {str(key): value for key, value in entry.items() if key not in ("target", "threads")}
    known = [field.name for field in fields(module.Options)]
    for key in options:
        if key not in known:
            raise unknown_name(f"option of device {name}", key, ["target", "threads", *known])
    try:
        threads = TypeAdapter(int | None).validate_python(entry.get("threads"))
        checked = TypeAdapter(module.Options).validate_python(options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "threads"
        raise UserError(f"device {name}: {key}: {problem['msg']}, got {problem['input']!r}") from error
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    missing = module.missing(address)
    if missing:
        raise UserError(f"target {target!r} cannot be used here: {missing}")
    return Device(name, target, address, _own_folders(name, checked), threads)


def _own_folders(device: str, options: Any) -> Any:
    """The options with a folder of this device in every folder that is written, made now: later it would cost what was measured."""
    given = {field.name: getattr(options, field.name) for field in fields(options) if field.metadata.get("output")}
    own = {key: folder / device.replace("/", "-") for key, folder in given.items() if folder is not None}
    for key, folder in own.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_full(error):
                raise
            raise UserError(f"{key}: cannot make folder {folder}: {error.strerror}; give another folder, not a file") from error
    return replace(options, **own)
