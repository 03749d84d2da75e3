"""`megaxelm router`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunArgument, RunsOption, open_run

app = typer.Typer(no_args_is_help=True, help="The routers of a run.")


@app.callback()
def _group() -> None:
    pass


@app.command("fit")
def router_fit(
    run: RunArgument,
    router: Annotated[str | None, typer.Option(help="Whose fallback weight and top_m are fitted. Default: the ensemble's router.")] = None,
    tolerance: Annotated[float, typer.Option(help="Bits per byte that fewer experts may cost.")] = 1e-3,
    write: Annotated[bool, typer.Option("--write", help="Put the fitted values into the run's recipe.yaml.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Fit temperature, prior, fallback weight and top_m on half of the held-out documents; judge them by the other half."""
    from megaxelm.evaluate.fit import fit_run
    from megaxelm.evaluate.fit_write import fit_text, write_fit
    from megaxelm.files import write_json

    folder, _ = open_run(run, None, runs)
    found = fit_run(folder.path, router, tolerance)
    print(fit_text(found))
    if as_json is not None:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        write_json(as_json, found)
    if write:
        write_fit(folder, found)
        print(f"written to {folder.path}/recipe.yaml; put them into your own recipe too, or `megaxelm run` takes that one's values again")
        print(f"the ensemble is to be made again with them: megaxelm evaluate {folder.path}")
