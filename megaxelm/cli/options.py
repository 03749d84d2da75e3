"""Arguments that several verbs share, and how a RUN is found."""

from __future__ import annotations

import os
import sys
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

RouterOption = Annotated[str | None, typer.Option(help="language, tfidf, posterior, uniform or fixed. Default: the ensemble's.")]
TopMOption = Annotated[int | None, typer.Option(help="Experts kept and run. Default: the ensemble's.")]
CombineOption = Annotated[str | None, typer.Option(help="mixture or logit_mean. Default: the ensemble's.")]
DraftOption = Annotated[str | None, typer.Option(help="An expert that proposes tokens, which the mixture verifies: the same texts.")]
DraftTokensOption = Annotated[int, typer.Option(min=1, help="Tokens that it proposes at a time.")]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: cuda where there is one.")]
RefreshOption = Annotated[str | None, typer.Option(help="Weights are made anew: token, chunk or frozen. Default: the ensemble's.")]
RefreshTokensOption = Annotated[int | None, typer.Option(help="Tokens of a chunk, or until weights are frozen.")]
PosteriorDecayOption = Annotated[
    str | None, typer.Option(help="cumulative (1), one-step (0), or a number between: what a token counts for each one after it.")
]
PosteriorReadsOption = Annotated[str | None, typer.Option(help="With --top-m: kept or all; who runs after the prompt.")]
DevicesOption = Annotated[int | None, typer.Option(min=1, help="Devices that share the experts, a process each. Default: the ensemble's.")]
ResidentOption = Annotated[
    int | None, typer.Option(min=1, help="Experts in the device's memory at one time; the others wait on the disk. Default: all.")
]


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


def router_settings(
    refresh: str | None, refresh_tokens: int | None, posterior_decay: str | None, posterior_reads: str | None
) -> dict[str, Any]:
    """The settings of a router that were given."""
    from megaxelm.ensemble.routers.posterior import DECAY_NAMES

    given: dict[str, Any] = {"refresh": refresh, "refresh_tokens": refresh_tokens, "posterior_reads": posterior_reads}
    if posterior_decay is not None:
        try:
            given["posterior_decay"] = DECAY_NAMES[posterior_decay] if posterior_decay in DECAY_NAMES else float(posterior_decay)
        except ValueError:
            rule = "choose cumulative, one-step, or a number from 0 to 1"
            raise RoutingError(f"--posterior-decay {posterior_decay}: {rule}") from None
    return {name: value for name, value in given.items() if value is not None}


def open_mixture(
    run: Path, dtype: str, device: str | None, *, router: str | None = None, routing: dict[str, Any] | None = None, **settings: Any
) -> tuple[Ensemble, Engine]:
    """The ensemble of a run, or one that was moved, and an engine over it; on a rank of several an engine over this rank's experts.

    Args:
        device: None takes CUDA where there is one. routing: settings of the router. settings: of the engine.
    """
    import torch

    from megaxelm.ensemble.engine import Engine
    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.ensemble.shards import join_ranks, rank_device
    from megaxelm.ensemble.text_scores import default_device

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise RoutingError(f"--dtype {dtype}: choose one of {', '.join(dtypes)}")
    try:
        chosen = rank_device(torch.device(device or default_device()))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise RoutingError(f"--device {device}: not usable here ({str(error).splitlines()[0]}); choose cpu, or leave it out") from None
    ensemble = load_ensemble(run if (run / "config.json").exists() else run / "ensemble", dtypes[dtype], chosen)
    shards = join_ranks(len(ensemble.experts), chosen)
    return ensemble, Engine(ensemble, router=ensemble.router(router, **routing) if routing else router, shards=shards, **settings)


def spread_over_devices(run: Path, devices: int | None, reads_input: bool = False) -> bool:
    """Start this command again as the ranks that share the experts, and end with their exit code; or on such a rank, or alone, go on.

    Args:
        devices: None takes the ensemble's. reads_input: whether the command reads the standard input, which only one process has.

    Returns:
        Whether this process speaks: the only one, or the first rank; the output of the others goes nowhere.
    """
    if "WORLD_SIZE" in os.environ:
        if os.environ["RANK"] == "0":
            return True
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        return False
    from megaxelm.ensemble.folder import read_devices

    devices = devices or read_devices(run if (run / "config.json").exists() else run / "ensemble")
    if devices == 1:
        return True
    if reads_input:
        raise RoutingError(f"--devices {devices}: a batch from the standard input reaches one process alone; give a file")
    from megaxelm.ensemble.shards import run_on_devices

    raise typer.Exit(run_on_devices(devices, sys.argv[1:]))
