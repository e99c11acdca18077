"""README.md and what it leads to: links lead somewhere, and what it says of the command line is there."""

import argparse
import re
from pathlib import Path

import pytest

from gcvit_edge.cli import EXIT_CODES, build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "NOTES.md", ROOT / "calib" / "README.md"]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    return next(dict(action.choices) for action in build_parser()._actions if action.dest == "verb" and action.choices)


def first_column(heading: str) -> list[str]:
    """The first cells of the README's table that begins with `heading`."""
    table = PAGES[0].read_text().partition(heading)[2].partition("\n\n")[0]
    return re.findall(r"^\| (.*?) \|", table, flags=re.M)[1:]  # without the line below the heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_every_page_is_reached_from_the_readme() -> None:
    readme = PAGES[0].read_text()
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name})" not in readme] == []


def test_verbs_and_exit_codes_of_the_readme_are_those_of_the_command_line() -> None:
    rows = first_column("| verb | what it does |")
    assert [verb for verb in verbs() if verb != "quantize" and not any(re.match(rf"`{verb}[ `]", row) for row in rows)] == []
    assert re.findall(r"^  (\d+) ", EXIT_CODES, flags=re.M) == first_column("| code | meaning |")


def test_every_recipe_is_in_the_readme() -> None:
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    rows = first_column("| recipe | what is in integers |")
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == recipes


def test_flags_of_the_documents_exist() -> None:
    """Every option of a `gcvit-edge VERB` command in a code block is one of that verb."""
    parsers, wrong = verbs(), []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.match(r"gcvit-edge (\S+)(.*?)(?: #|$)", line)
                if command:
                    known = parsers[command[1]]._option_string_actions
                    wrong += [
                        f"{page.name}: {command[1]} {flag}"
                        for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", command[2])
                        if flag not in known
                    ]
    assert wrong == []
