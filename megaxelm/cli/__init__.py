"""`megaxelm <verb>`: thin functions, one a verb. Verbs that make take a RECIPE, verbs that use take a RUN directory.

A mistake of the user (MegaxelmError) is printed without a traceback and ends with exit code 2. What a verb needs is imported inside it,
so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from megaxelm import __version__
from megaxelm.cli import cluster, forgetting, generate, grow, index, lineage, merge, models, plan, recipe, router, run, score, serve
from megaxelm.cli.words import SeveralWords
from megaxelm.console import end_on_signals, run_guarded

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Train, mix and grow X-ELM language models."
)
_VERBS: list[Callable[..., None]] = [
    *(run.run, run.prepare, run.train, run.submit, run.status, lineage.lineage, run.evaluate, run.report),
    *(grow.grow, grow.drop, merge.merge, merge.ladder, forgetting.forgetting),
    *(models.export, generate.generate, score.score, serve.serve, plan.plan),
]
for verb in _VERBS:
    several = SeveralWords if verb in (grow.grow, grow.drop) else None
    app.command(cls=several, context_settings={"allow_extra_args": verb is run.submit})(verb)  # `submit` hands what follows -- to sbatch
app.add_typer(recipe.app, name="recipe")
app.add_typer(cluster.app, name="cluster")
app.add_typer(index.app, name="index")
app.add_typer(router.app, name="router")
app.add_typer(plan.bench_app, name="bench")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"megaxelm {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `megaxelm` command."""
    end_on_signals()
    sys.exit(run_guarded(lambda: app()))
