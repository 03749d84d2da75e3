"""The verb `lineage`: who branched from whom, and whether the weights are still those that were trained."""

from __future__ import annotations

from typing import Annotated

import typer

from megaxelm.cli.options import RUNS, RunArgument, RunsOption, open_run


def lineage(
    run: RunArgument,
    check: Annotated[bool, typer.Option("--check", help="Hash the weights of every export anew; exit code 1 where one differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: experts, history, and with --check what is wrong.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Draw the tree of a run's models: parent, round, languages, tokens, weights; and what was grown since."""
    import json
    import sys

    from rich.console import Console

    from megaxelm.errors import StageError
    from megaxelm.lineage import LINEAGE, check_lineage, lineage_tree, read_history
    from megaxelm.stages import Stages

    folder, recipe = open_run(run, None, runs)
    entries = Stages(folder, recipe, check_sources=False).lineage()
    if not entries and not (folder.path / LINEAGE).exists():
        raise StageError(f"{folder.path}: nothing of this run is trained yet; megaxelm run RECIPE --until experts")
    history = read_history(folder.path)
    wrong = check_lineage(folder.path, entries) if check else {}
    if as_json:
        print(json.dumps({"experts": entries, "history": history} | ({"wrong": wrong} if check else {}), ensure_ascii=False))
    else:
        # A file or a pipe has no width to keep to.
        console = Console(width=None if sys.stdout.isatty() else 240)
        console.print(lineage_tree(folder.name, entries))
        for event in history:
            touched = f"changed: {', '.join(event['changed'])}" if event["changed"] else "what was there before is unchanged"
            console.print(f"{event['when']}  {event['what']}: {touched}", markup=False, highlight=False, soft_wrap=True)
        for name, problem in wrong.items():
            console.print(f"DIFFERS  {name}: {problem}", markup=False, highlight=False, soft_wrap=True)
        if check and not wrong:
            console.print(f"{len(entries)} models checked: the weights of each are those that were trained", highlight=False)
    if wrong:
        raise typer.Exit(1)
