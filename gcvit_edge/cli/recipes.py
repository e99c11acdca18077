"""`gcvit-edge recipes`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from gcvit_edge.cli import Result

HELP = """list the recipes, or show one

  gcvit-edge recipes list
  gcvit-edge recipes show int8_ptq > my_recipe.yaml      then edit, and: quantize --recipe my_recipe.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("list", "show"), metavar="list|show", help="all recipes, a line each, or one of them, whole")
    parser.add_argument("name", nargs="?", metavar="RECIPE", help="recipe name or .yaml file, for show")


def run(arguments: argparse.Namespace, errors: "Console") -> "Result":
    from gcvit_edge.cli import Result
    from gcvit_edge.errors import UserError
    from gcvit_edge.recipe import parse_recipe, recipe_names, recipe_text

    if arguments.what == "show":
        if arguments.name is None:
            raise UserError(f"which recipe? one of: {', '.join(recipe_names())}")
        text = recipe_text(arguments.name)
        recipe = parse_recipe(text, arguments.name)
        return Result(recipe.model_dump(), [text.rstrip("\n")])
    if arguments.name is not None:
        raise UserError(f"`recipes list` lists all; for {arguments.name} alone: gcvit-edge recipes show {arguments.name}")
    recipes = [parse_recipe(recipe_text(name), name) for name in recipe_names()]
    return Result([recipe.model_dump() for recipe in recipes], [f"{recipe.name:14} {recipe.description}" for recipe in recipes])
