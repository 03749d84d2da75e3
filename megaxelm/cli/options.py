"""Arguments that several verbs share, and how a RUN is found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaxelm.errors import StageError
from megaxelm.recipe import Recipe, load_recipe
from megaxelm.run import RunFolder

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the recipe of one.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field, e.g. --set train.lr=2e-3. Repeatable.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the run directories.")]
RUNS = Path("runs")


def open_run(path: Path, overrides: list[str] | None, runs: Path) -> tuple[RunFolder, Recipe]:
    """A run directory with its stored recipe, or the run directory of a recipe."""
    if path.is_dir():
        folder = RunFolder(path)
        folder.recipe()
        return folder, load_recipe(path / "recipe.yaml", overrides or ())
    recipe = load_recipe(path, overrides or ())
    folder = RunFolder(runs / recipe.name)
    if not folder.path.exists():
        raise StageError(f"{folder.path}: this recipe has not been run yet: megaxelm run {path}")
    return folder, recipe
