"""Verbs that make and look at a run: `run`, `prepare`, `train`, `submit`, `status`, `evaluate`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megaxelm.cli.options import RUNS, RecipeArgument, RunArgument, RunsOption, SetOption, open_run
from megaxelm.errors import StageError
from megaxelm.recipe import load_recipe
from megaxelm.run import RunFolder


def run(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    until: Annotated[str | None, typer.Option(help="Last stage to make.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Make this stage and those after it, even when fresh.")] = None,
    only: Annotated[str | None, typer.Option(help="Make this stage alone.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Make what is missing or stale of a run, from the corpus to the report."""
    from megaxelm.stages import Stages

    loaded = load_recipe(recipe, overrides or ())
    folder = RunFolder(runs / loaded.name)
    made = Stages(folder, loaded).run(until=until, start=start, only=only)
    if not made:
        print(f"{folder.path}: everything is up to date; nothing to do")
    if (folder.path / "evaluation" / "results.json").exists() and made and until is None:
        _print_table(folder)
    if (folder.path / "report" / "index.html").exists():
        print(f"report: {folder.path}/report/index.html")


def prepare(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    start: Annotated[str | None, typer.Option("--from", help="Make this stage and those after it, even when fresh.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Prepare a corpus: read, deduplicate, tokenise, assign to clusters, merge into token indexes. Where: the recipe's `executor:`."""
    from megaxelm.stages import Stages

    loaded = load_recipe(recipe, overrides or ())
    folder = RunFolder(runs / loaded.name)
    if not Stages(folder, loaded).run(until="index", start=start):
        print(f"{folder.path}: everything is up to date; nothing to do")


def train(
    run: RunArgument,
    expert: Annotated[
        str | None, typer.Option(help="seed, dense, or a cluster's name; its parents are trained if they have to be. Default: all.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Seed, dense and every expert; the default.")] = False,
    hostfile: Annotated[Path | None, typer.Option(help="Nodes that deepspeed reaches by ssh, a line each: `worker-1 slots=8`.")] = None,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Train models of a run whose token index is made. Exit code 75: stopped and saved, the same command goes on."""
    from megaxelm.stages import Stages
    from megaxelm.train.ds_config import check_ds_config, find_ds_config
    from megaxelm.train.launch import LaunchOptions
    from megaxelm.train.members import find_member

    if everything and expert is not None:
        raise StageError(f"--all and --expert {expert}: give one of them")

    folder, recipe = open_run(run, overrides, runs)
    check_ds_config(find_ds_config(recipe.train.deepspeed_config), recipe.train)
    stages = Stages(folder, recipe, check_sources=False)
    if expert is not None:
        find_member(stages.members(), expert)
    made = stages.train_models(expert, LaunchOptions(hostfile))
    if not made:
        print("trained already and fresh; nothing to do")


def submit(
    context: typer.Context,
    recipe: RecipeArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the jobs and submit none.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of one model's training.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="0: train on CPUs. Default: train.num_devices.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of all jobs.")] = None,
    account: Annotated[str | None, typer.Option(help="Account of all jobs.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of each job, as sbatch has it.")] = None,
    stage: Annotated[Path | None, typer.Option(help="Copy the token index to this folder of each node and train from there.")] = None,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Submit to Slurm what is missing or stale of a run: prepare, seed, experts (an array), evaluate. After --: options of sbatch."""
    from megaxelm.submit import SubmitOptions, plan_jobs, plan_text, submit_jobs

    loaded = load_recipe(recipe, overrides or ())
    folder = RunFolder(runs / loaded.name)
    options = SubmitOptions(nodes, gpus_per_node, partition, account, time, stage and stage.absolute(), context.args)
    jobs = plan_jobs(folder, loaded, options)
    if not jobs:
        print(f"{folder.path}: everything is up to date; nothing to submit")
        return
    print(plan_text(folder, jobs))
    if not dry_run:
        numbers = submit_jobs(folder, loaded, jobs)
        print("submitted: " + ", ".join(f"{name} as job {number}" for name, number in numbers.items()))
        print(f"see how it goes: megaxelm status {folder.path}")


def status(
    run: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="One JSON object a model.")] = False, runs: RunsOption = RUNS
) -> None:
    """Print state, step, loss, speed and time left of every model of a run, and what Slurm says of its jobs."""
    import json
    from dataclasses import asdict

    from megaxelm.status import run_status, status_text

    lines, members = run_status(open_run(run, None, runs)[0])
    print("\n".join(json.dumps(asdict(item), ensure_ascii=False) for item in members) if as_json else status_text(lines, members))


def evaluate(
    run: RunArgument,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, by comma; the rest belongs to them.")] = None,
    include_path: Annotated[Path | None, typer.Option("--include_path", "--include-path", help="Folder of task files (YAML).")] = None,
    limit: Annotated[float | None, typer.Option(help="Documents a task; below 1: the share of them.")] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num_fewshot", "--num-fewshot", help="Examples in front of each document.")] = None,
    router: Annotated[str | None, typer.Option(help="language, tfidf, posterior, uniform or fixed. Default: the ensemble's.")] = None,
    top_m: Annotated[int | None, typer.Option(help="Experts kept. Default: the ensemble's.")] = None,
    expert: Annotated[str | None, typer.Option(help="One expert alone instead of the mixture.")] = None,
    combine: Annotated[str | None, typer.Option(help="mixture or logit_mean. Default: the ensemble's.")] = None,
    language: Annotated[str | None, typer.Option(help="Language of all texts, for the language router.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts at one time. Default: 64.")] = None,
    rung: Annotated[
        str | None, typer.Option(help="Of the merge ladder, by comma: mixture, seed, dense, a merged model, or all. Default: the mixture.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File for the results (JSON).")] = None,
    overrides: SetOption = None,
    runs: RunsOption = RUNS,
) -> None:
    """Bits per byte and perplexity by language of seed, dense, experts and mixtures; made when stale. With --tasks: of the harness."""
    given: dict[str, Any] = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "router": router,
        "top_m": top_m,
        "expert": expert,
        "combine": combine,
    }
    given |= {"language": language, "batch_size": batch_size, "include_path": include_path}
    if tasks is not None:
        _evaluate_tasks(run, runs, tasks, output, given, rung)
        return
    wrong = [name for name, value in (given | {"output": output, "rung": rung}).items() if value is not None]
    if wrong:
        raise StageError(f"--{wrong[0].replace('_', '-')}: belongs to --tasks, which is missing")
    from megaxelm.stages import Stages

    folder, recipe = open_run(run, overrides, runs)
    stages = Stages(folder, recipe, check_sources=False)
    stages.make_one("ensemble")
    stages.make_one("evaluation")
    _print_table(folder)


def _evaluate_tasks(run: Path, runs: Path, tasks: str, output: Path | None, options: dict[str, Any], rung: str | None) -> None:
    # It says first what is not installed.
    from megaxelm.evaluate.harness import results_json, results_text, run_rungs, run_tasks, rungs_table

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise StageError("--tasks: names no task; give some by comma, e.g. --tasks xcopa_sw,xcopa_tr")
    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.ensemble.text_scores import default_device

    if rung is not None:
        from megaxelm.evaluate.rungs import choose_rungs

        if options["expert"] is not None:
            raise StageError(f"--expert {options['expert']} and --rung {rung}: give one of them")
        place = run if run.is_dir() else open_run(run, None, runs)[0].path
        chosen = choose_rungs(place, rung)
        by_rung = run_rungs(place, chosen, names, default_device(), **options)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(results_json(by_rung), encoding="utf-8")
        print(rungs_table(by_rung))
        return
    folder = run if (run / "config.json").exists() else run / "ensemble" if run.is_dir() else open_run(run, None, runs)[0].path / "ensemble"
    results = run_tasks(load_ensemble(folder, device=default_device()), names, **options)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(results_json(results), encoding="utf-8")
    print(results_text(results))


def report(run: RunArgument, runs: RunsOption = RUNS) -> None:
    """Write the HTML report of an evaluated run again."""
    from megaxelm.stages import Stages

    folder, recipe = open_run(run, None, runs)
    Stages(folder, recipe, check_sources=False).run(only="report")
    print(f"report: {folder.path}/report/index.html")


def _print_table(folder: RunFolder) -> None:
    from megaxelm.evaluate.table import print_table
    from megaxelm.files import read_json

    print_table(read_json(folder.path / "evaluation" / "results.json", languages=list, models=dict))
