"""`megaxelm cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RecipeArgument, RunArgument, RunsOption, SetOption, open_run
from megaxelm.recipe import load_recipe
from megaxelm.run import RunFolder

app = typer.Typer(no_args_is_help=True, help="Divide the corpus among experts.")


@app.command("make")
def cluster_make(recipe: RecipeArgument, overrides: SetOption = None, runs: RunsOption = RUNS) -> None:
    """Make the clusters of a recipe, and what they need."""
    from megaxelm.stages import Stages

    loaded = load_recipe(recipe, overrides or ())
    Stages(RunFolder(runs / loaded.name), loaded).run(until="clusters")


@app.command("show")
def cluster_show(run: RunArgument, runs: RunsOption = RUNS) -> None:
    """Print the clusters of a run."""
    from megaxelm.cluster.stage import show_report
    from megaxelm.files import read_json

    folder, _ = open_run(run, None, runs)
    show_report(read_json(folder.folder("clusters") / "report.json", names=list, clusters=list))


@app.command("donors")
def cluster_donors(
    languages: Annotated[list[str], typer.Argument(help="Languages that need a donor.")],
    among: Annotated[
        str, typer.Option(help="Languages that have experts, with commas.")
    ] = "ar,bg,de,el,en,es,fr,hi,ja,ko,ru,sw,tr,ur,vi,zh",
    number: Annotated[int, typer.Option(min=1, help="Relatives shown of each language.")] = 5,
    features: Annotated[str, typer.Option(help="URIEL feature set, as in clusters.typology.features.")] = "syntax_average",
    distances: Annotated[Path | None, typer.Option(help="CSV file of your own distances in place of URIEL.")] = None,
) -> None:
    """Print the nearest relatives of languages, by typology: the first one's expert is the donor."""
    from megaxelm.cluster.typology import donors
    from megaxelm.recipe import TypologyConfig

    known = [code.strip() for code in among.split(",") if code.strip()]
    config = TypologyConfig(features=features, distances=str(distances) if distances else None)
    for language, near in donors(languages, known, config):
        print(f"{language}: " + "  ".join(f"{code} {distance:.4f}" for code, distance in near[:number]))
