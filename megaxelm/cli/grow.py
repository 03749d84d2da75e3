"""Verbs that change which languages a trained run speaks: `grow`, `drop`."""

from __future__ import annotations

from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunArgument, RunsOption, SetOption, open_run


def grow(
    run: RunArgument,
    languages: Annotated[list[str], typer.Option(help="New languages: az,he,pl,sv, or az he pl sv behind RUN.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Text of them: a file or glob with the fields of the run's, or LANGUAGE=FILE. Default: the run's sources."
        ),
    ] = None,
    valid: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Held-out text of them, for a run with corpus.valid.")] = None,
    donor: Annotated[str, typer.Option(help="Whom the new expert branches from: auto, bits, typology, or a model's name.")] = "auto",
    replay: Annotated[float, typer.Option(help="Share of the training text that is of the donor's languages.")] = 0.25,
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: those of an expert of the run.")] = None,
    lapt: Annotated[bool, typer.Option("--lapt", help="Also continue the dense model and the seed on the same text, to compare.")] = False,
    together: Annotated[bool, typer.Option("--together", help="One expert for all the languages.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and tell, train nothing.")] = False,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Add languages to a trained run: a new expert each, branched from the nearest one; the old experts are not touched."""
    from megaxelm.grow.make import GrowOptions
    from megaxelm.grow.make import grow as grow_run

    folder, recipe = open_run(run, None, runs)
    options = GrowOptions(
        languages=_names(languages),
        corpus=corpus or (),
        valid=valid or (),
        donor=donor,
        replay=replay,
        steps=steps,
        lapt=lapt,
        together=together,
        dry_run=dry_run,
        overrides=overrides or (),
    )
    if not grow_run(folder, recipe, options) and not dry_run:
        print("grown already and fresh; nothing to do")


def drop(
    run: RunArgument,
    languages: Annotated[list[str] | None, typer.Option(help="Languages: az,sv, or az sv behind RUN.")] = None,
    experts: Annotated[list[str] | None, typer.Option(help="Experts, in the same way.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Bring them back.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Leave languages or experts out of ensemble, routers and evaluation; no file is removed, and everything else stays as it was."""
    from megaxelm.grow.drop import drop as drop_from_run

    folder, recipe = open_run(run, None, runs)
    drop_from_run(folder, recipe, _names(languages or []), _names(experts or []), undo)


def _names(given: list[str]) -> list[str]:
    return [name.strip() for part in given for name in part.split(",") if name.strip()]
