"""Files that people write: settings in YAML whose sections refuse what they do not know, and messages that say what is wrong."""

import json
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from gcvit_edge.errors import UserError, nearest
from gcvit_edge.paths import require_file


class Section(BaseModel):
    """A mapping of a YAML file: frozen, without unknown keys, without infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own takes the last: a section put at the end of a copied recipe would take the
    place of the one above, all of it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        yaml.YAMLError: it is no YAML, or has a key twice.
    """
    return yaml.load(text, _Loader)


def parse_yaml(schema: type[S], text: str, source: str) -> S:
    """Validates a YAML text; `source` is how error messages call it.

    Raises:
        UserError: not YAML, a key that is there twice, an unknown one (the message names the nearest valid one) or a value of the wrong
            kind.
    """
    try:
        data = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{source} must be a mapping of keys to values, got {type(data).__name__}")
    return validate(schema, data, source)


def validate(schema: type[S], data: dict[str, Any], source: str) -> S:
    """Validates keys and values; see `parse_yaml`.

    Raises:
        UserError: an unknown key or a value of the wrong kind.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(schema, detail)}" for detail in error.errors())
        raise UserError(f"{source} is not valid:\n{problems}") from None


def read_text(path: Path, what: str) -> str:
    """The text of a file; `what` is how error messages call it.

    Raises:
        UserError: the file is missing, or no text in UTF-8.
    """
    require_file(path, f"{what} file")
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that editors on Windows put first
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}; give a text file in UTF-8") from error


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; `what` is how error messages call it.

    Raises:
        UserError: the file is missing, no text in UTF-8, or not JSON.
    """
    try:
        return json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise UserError(f"{what} file {path} is not JSON: {error}") from error


def _explain(schema: type[BaseModel], detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _keys_beside(schema, detail["loc"])
        guess = nearest(str(detail["loc"][-1]), known)
        hint = f"did you mean {guess!r}?" if guess else f"valid keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if detail["type"] == "missing":
        return f"key {where!r} is missing"
    if detail["type"] == "value_error":  # of several keys, which the message names
        return f"{where}: {detail['ctx']['error']}" if where else str(detail["ctx"]["error"])
    return f"{where}: got {detail['input']!r}; {detail['msg']}"


def _keys_beside(schema: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    for part in location[:-1]:
        annotation = schema.model_fields[str(part)].annotation
        for choice in (annotation, *get_args(annotation)):  # the section itself, or one that may be left out
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                schema = choice
    return list(schema.model_fields)
