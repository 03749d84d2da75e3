"""Arguments that several verbs share, and how a RUN is found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaxelm.errors import RoutingError, StageError
from megaxelm.recipe import Recipe, load_recipe
from megaxelm.run import RunFolder

if TYPE_CHECKING:
    from megaxelm.ensemble.engine import Engine
    from megaxelm.ensemble.folder import Ensemble

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


def open_mixture(run: Path, dtype: str, device: str | None, **settings: Any) -> tuple[Ensemble, Engine]:
    """The ensemble of a run, or one that was moved, and an engine over it.

    Args:
        device: None takes CUDA where there is one. settings: of the engine.
    """
    import torch

    from megaxelm.ensemble.engine import Engine
    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.ensemble.text_scores import default_device

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise RoutingError(f"--dtype {dtype}: choose one of {', '.join(dtypes)}")
    try:
        chosen = torch.device(device or default_device())
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise RoutingError(f"--device {device}: not usable here ({str(error).splitlines()[0]}); choose cpu, or leave it out") from None
    ensemble = load_ensemble(run if (run / "config.json").exists() else run / "ensemble", dtypes[dtype], chosen)
    return ensemble, Engine(ensemble, **settings)
