"""The result of devices is described in the README, field by field."""

from pathlib import Path

from gcvit_edge.measurement.result import Report

README = Path(__file__).parents[2] / "README.md"


def test_every_field_is_in_the_readme() -> None:
    schema = Report.model_json_schema()
    fields = {name for part in (schema, *schema["$defs"].values()) for name in part["properties"]}
    assert {"runs", "samples_ms", "temperatures_c", "sqnr_db"} <= fields
    text = README.read_text(encoding="utf-8").partition("The result is JSON")[2].partition("\n## ")[0]
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
