"""Class names in the order of the logits."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gcvit_edge.errors import UserError
from gcvit_edge.schema import read_json, read_text


class Labels(BaseModel):
    """Class names in the order of the logits, and the folder name of each class (the name itself, or a WordNet id)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...]
    folders: tuple[str, ...]

    @staticmethod
    def of(names: Iterable[str]) -> "Labels":
        """Labels whose folders are their names, with what a file system cannot have replaced by `_`.

        Raises:
            UserError: a name of several lines.
        """
        return _labels([(name, name) for name in names], "the model or the image folders give")


def read_labels(path: Path) -> Labels:
    """Reads class names: a text file with a class a line (`name`, or `folder<TAB>name`), or JSON.

    JSON may be a list of names, a list of `{"wnid": folder, "name": name}`, Hugging Face's `{"id2label": {"0": name}}`, or
    an object with such a list under "classes".

    Raises:
        UserError: the file is missing, empty or of another form.
    """
    if path.suffix == ".json":
        data: Any = read_json(path, "labels")
        data = data.get("classes") or data.get("id2label") or data if isinstance(data, dict) else data
        if isinstance(data, dict):  # id2label
            data = [data[key] for key in sorted(data, key=int)] if all(key.isdigit() for key in data) else []
        entries = data if isinstance(data, list) else []
        pairs: list[Any] = [(e["wnid"], e["name"]) if isinstance(e, dict) and {"wnid", "name"} <= set(e) else (e, e) for e in entries]
        if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
            raise UserError(f"{path} holds no list of class names; give a list of strings, or a text file with a name a line")
    else:
        lines = [line.rstrip("\r") for line in read_text(path, "labels").split("\n") if line.strip()]
        if not lines:
            raise UserError(f"labels file {path} is empty; write one class name a line, in the order of the logits")
        pairs = [(line.split("\t")[0], line.split("\t")[-1]) for line in lines]
    return _labels(pairs, f"{path} has")


def _labels(pairs: Sequence[tuple[str, str]], holder: str) -> Labels:
    """Of (folder, name); `holder` is who has them in the error message."""
    for name in (text for pair in pairs for text in pair):
        if len(f"{name}.".splitlines()) > 1:
            raise UserError(f"{holder} a class name of several lines, {name!r}; labels.txt of a bundle has one a line")
    return Labels(names=tuple(name for _, name in pairs), folders=tuple(folder.replace("/", "_") for folder, _ in pairs))
