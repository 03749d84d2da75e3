"""The verb `forgetting`: what every expert gained on its own languages, and lost elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunsOption, open_run


def forgetting(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|CSV", help="Run directory, the recipe of one, or a CSV file of perplexities: expert, languages ..."),
    ],
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with heat maps to this file.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Print who forgets what: the change of every model on every language, what a wrong choice of expert costs, and a verdict."""
    from megaxelm.evaluate.forgetting_table import print_forgetting

    if source.suffix.lower() == ".csv":
        from megaxelm.evaluate.forgetting import forgetting_results
        from megaxelm.evaluate.matrix_csv import read_matrix_csv

        found, name = forgetting_results(read_matrix_csv(source)), source.stem
    else:
        from megaxelm.evaluate.run_forgetting import run_forgetting

        folder, _ = open_run(source, None, runs)
        found, name = run_forgetting(folder.path), folder.path.resolve().name
    if as_json is not None:
        from megaxelm.files import write_json

        as_json.parent.mkdir(parents=True, exist_ok=True)
        write_json(as_json, found)
    if html is not None:
        from megaxelm.report.forgetting import write_forgetting_page

        html.parent.mkdir(parents=True, exist_ok=True)
        write_forgetting_page(found, name, html)
    print_forgetting(found)
