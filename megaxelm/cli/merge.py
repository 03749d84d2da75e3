"""The verbs `merge` and `ladder`: one model from the experts of a run, and the table of all that was made so."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from megaxelm.cli.options import RUNS, RunArgument, RunsOption, SetOption, open_run
from megaxelm.errors import MergeError
from megaxelm.recipe import load_recipe

_BELONGS = {
    "top_k": ("moe",),
    "ridge": ("moe",),
    "router_scale": ("moe",),
    "router_steps": ("moe",),
    "train": ("moe",),
    "weights": ("average", "moe"),
    "sample_tokens": ("average", "moe"),
    "steps": ("distilled",),
    "start": ("distilled",),
    "label_weight": ("distilled",),
    "top_m": ("distilled",),
    "router": ("average", "moe", "distilled"),
}


def merge(
    run: RunArgument,
    into: Annotated[str, typer.Option(help="average, moe (a mixture-of-experts model) or distilled (one dense model).")],
    name: Annotated[str | None, typer.Option(help="Of the rung: its folder is RUN/merged/NAME. Default: follows from the options.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of the experts: uniform (default), language:CODE, posterior:CODE, router, or a=0.7,b=0.3. moe: of what is averaged."
        ),
    ] = None,
    router: Annotated[
        str | None, typer.Option(help="For --weights router, and of the mixture that is distilled. Default: the ensemble's.")
    ] = None,
    sample_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of training text that is fitted on. Default: 20000.")] = None,
    top_k: Annotated[int | None, typer.Option(help="moe: experts that read a token. Default: 2.")] = None,
    ridge: Annotated[float | None, typer.Option(help="moe: lambda of the regression. Default: 0.01.")] = None,
    router_scale: Annotated[float | None, typer.Option(help="moe: scale of the router's scores. Default: fitted in each layer.")] = None,
    router_steps: Annotated[int | None, typer.Option(min=1, help="moe: train the fitted model further, for so many steps.")] = None,
    train: Annotated[str | None, typer.Option(help="moe, with --router-steps: routers (default) or all parameters.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="distilled: steps of training. Default: 100.")] = None,
    start: Annotated[str | None, typer.Option(help="distilled: average (default), seed, dense, or a rung that is a dense model.")] = None,
    label_weight: Annotated[
        float | None, typer.Option(help="distilled: share of the labels in the loss, 0 to 1. Default: 0, the mixture's predictions alone.")
    ] = None,
    top_m: Annotated[int | None, typer.Option(help="distilled: experts that the mixture keeps. Default: the ensemble's.")] = None,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Make one model from the experts of a run: RUN/merged/NAME, a Hugging Face checkpoint. --set: of a training, as in train.lr=1e-4."""
    given: dict[str, Any] = {
        "weights": weights,
        "router": router,
        "sample_tokens": sample_tokens,
        "top_k": top_k,
        "ridge": ridge,
        "router_scale": router_scale,
        "router_steps": router_steps,
        "train": train,
        "steps": steps,
        "start": start,
        "label_weight": label_weight,
        "top_m": top_m,
    }
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        option = f"--{key.replace('_', '-')}"
        if into in ("average", "moe", "distilled") and into not in _BELONGS[key]:
            raise MergeError(f"{option}: belongs to --into {' and '.join(_BELONGS[key])}, not to {into}; leave it out")
    if "train" in given and "router_steps" not in given:
        raise MergeError("--train: belongs to --router-steps, which is missing")
    if "router" in given and into != "distilled" and given.get("weights") != "router":
        raise MergeError("--router: belongs to --weights router; leave it out")
    if overrides and into != "distilled" and "router_steps" not in given:
        raise MergeError(f"--set {overrides[0]}: nothing is trained here; leave it out")
    from megaxelm.merge.make import MergeOptions, Merging
    from megaxelm.stages import Stages

    folder, recipe = open_run(run, None, runs)
    training = load_recipe(folder.path / "recipe.yaml", overrides) if overrides else recipe
    Stages(folder, recipe, check_sources=False).make_one("ensemble")
    Merging(folder, recipe, training).make(MergeOptions(into, name, **given))


def ladder(
    run: RunArgument,
    routers: Annotated[str | None, typer.Option(help="Mixtures to show, by comma. Default: evaluation.routers.")] = None,
    top_m: Annotated[str | None, typer.Option(help="Experts that the mixtures keep, by comma, as in all,2,1. Default: all.")] = None,
    max_documents: Annotated[
        int | None, typer.Option(min=1, help="Held-out documents a language. Default: evaluation.max_documents.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure tokens a second of scoring.")] = True,
    runs: RunsOption = RUNS,
) -> None:
    """Compare seed, dense, mixtures and all that was merged: bits per byte by language, parameters, tokens a second."""
    from megaxelm.merge.ladder import LadderOptions, climb
    from megaxelm.merge.ladder_table import print_ladder
    from megaxelm.stages import Stages

    folder, recipe = open_run(run, None, runs)
    Stages(folder, recipe, check_sources=False).make_one("ensemble")
    names = [part.strip() for part in routers.split(",")] if routers else None
    print_ladder(climb(folder, recipe, LadderOptions(names, _top_ms(top_m), max_documents, speed)))


def _top_ms(text: str | None) -> list[int | None]:
    found: list[int | None] = []
    for part in (text or "all").split(","):
        if part.strip() != "all" and not part.strip().isdigit():
            raise MergeError(f"--top-m {text}: numbers of experts by comma, or `all`, as in all,2,1")
        found.append(None if part.strip() == "all" else int(part))
    return found
