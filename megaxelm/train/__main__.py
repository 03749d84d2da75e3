"""Train one model of a run: the program that `deepspeed`, `torchrun` or `megaxelm train` starts on every rank.

    deepspeed --num_gpus 2 --module megaxelm.train runs/demo --expert dense --deepspeed_config ds_configs/zero2.json
    python -m megaxelm.train recipes/demo.yaml --expert seed

The clusters and the token index must be on disk (`megaxelm run RECIPE --until index`), and so must the model's parent.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megaxelm.console import run_guarded
from megaxelm.recipe import Recipe, load_recipe
from megaxelm.run import MARKER, MadeFrom, RunFolder
from megaxelm.stages import Stages
from megaxelm.train.ds_config import fill_ds_config, find_ds_config
from megaxelm.train.environment import Processes, check_compiler, check_device, find_processes
from megaxelm.train.extensions import extensions_folder, remove_stale_locks
from megaxelm.train.members import Member
from megaxelm.train.precision import on_device, precision_notes
from megaxelm.train.preemption import catch_signals

if TYPE_CHECKING:
    from megaxelm.train.setting import Setting

Bar = Callable[[Member, int], Iterable[int]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megaxelm.train", description="Train one model of a run.")
    parser.add_argument("run", help="a run directory, or the recipe of one")
    parser.add_argument("--expert", required=True, help="seed, dense, or the name of a cluster")
    parser.add_argument("--deepspeed_config", help="file or name in ds_configs/; default: train.deepspeed_config of the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the recipe")
    parser.add_argument("--runs", default="runs", help="folder of the runs, when a recipe is given (default: runs)")
    parser.add_argument("--profile", metavar="FIRST-LAST", help="trace these steps, counted from 1, into the expert's folder profile/")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; the environment is used")
    options = parser.parse_args(arguments)
    catch_signals()
    rank = os.environ.get("RANK", "0")
    return run_guarded(lambda: _train(options), prefix="" if rank == "0" else f"rank {rank}: ")


def _train(options: argparse.Namespace) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    path = Path(options.run)
    if path.is_dir():
        run = RunFolder(path)
        recipe = load_recipe(path / "recipe.yaml", options.set) if (path / "recipe.yaml").exists() else run.recipe()
    else:
        recipe = load_recipe(path, options.set)
        run = RunFolder(Path(options.runs) / recipe.name)
    stages = Stages(run, recipe, check_sources=False)
    member, made_from = stages.open_for_training(options.expert)
    train_open(run, recipe, member, made_from, options.deepspeed_config, options.profile)


def train_open(
    run: RunFolder,
    recipe: Recipe,
    member: Member,
    made_from: MadeFrom,
    deepspeed_config: str | None = None,
    profile: str | None = None,
    train: Callable[[Setting, Bar], None] | None = None,
) -> None:
    """Train a model whose inputs are there, on this rank, and close its folder with its marker.

    Args:
        deepspeed_config: None: that of the recipe. profile: steps to trace, `FIRST-LAST`.
        train: does it; None: `loop.train`.
    """
    processes = find_processes()
    # Held by rank 0 to the end of the process: nobody else may move or train this model meanwhile.
    with run.lock(f"experts/{member.name}") if processes.rank == 0 else contextlib.nullcontext():
        _train_member(run, recipe, member, made_from, processes, deepspeed_config, profile, train)


def _train_member(
    run: RunFolder,
    recipe: Recipe,
    member: Member,
    made_from: MadeFrom,
    processes: Processes,
    deepspeed_config: str | None,
    profile: str | None,
    train: Callable[[Setting, Bar], None] | None,
) -> None:
    if processes.rank == 0:
        check_compiler()
        run.write_recipe(recipe)
        moved = run.open_expert(member.name, made_from)
        if moved:
            print(f"the earlier `{member.name}` belongs to other settings and is kept in {moved}", flush=True)
        if (run.expert(member.name) / MARKER).exists():
            print(f"`{member.name}` is trained and fresh: nothing to do", flush=True)

    import torch

    from megaxelm.model.hub import weights_hash
    from megaxelm.train import loop
    from megaxelm.train.export import export_seed
    from megaxelm.train.process_group import join_process_group
    from megaxelm.train.profile import parse_steps
    from megaxelm.train.setting import Setting

    cuda = torch.cuda.is_available()
    if cuda:
        check_device(processes, torch.cuda.device_count())
    device = torch.device("cuda", processes.local_rank) if cuda else torch.device("cpu")
    if processes.rank == 0:
        for note in precision_notes(recipe, cuda):
            print(note, flush=True)
    recipe = on_device(recipe, cuda)
    ds_config = fill_ds_config(
        find_ds_config(deepspeed_config or recipe.train.deepspeed_config), recipe.train, member, processes.world_size, cuda
    )
    extensions = extensions_folder()
    if processes.local_rank == 0:
        for lock in remove_stale_locks(extensions):
            print(f"removed {lock}, which a killed process left: all that needs this extension would wait for it", flush=True)
    join_process_group(cuda)  # rank 0 has settled the folder before the others look into it
    if not (run.expert(member.name) / MARKER).exists():
        setting = Setting(run, recipe, member, ds_config, processes, device, parse_steps(profile) if profile else None)
        (train or loop.train)(setting, _bar) if member.steps else export_seed(setting)
        if processes.rank == 0:
            run.close_expert(member.name, made_from, weights_hash(run.expert(member.name) / "export"))
            print(f"`{member.name}` is trained: {member.tokens:,} tokens; export in {run.expert(member.name)}/export", flush=True)
    # Not in a `finally`: a rank that failed must end at once, so that the launcher ends those that wait for it.
    torch.distributed.destroy_process_group()


def _bar(member: Member, start: int) -> Iterable[int]:
    """Steps still to do, with a bar on a terminal; without one (a log file) the metrics say how far it is."""
    from tqdm import tqdm

    steps = range(start, member.steps)
    return tqdm(steps, desc=f"train {member.name}", total=member.steps, initial=start, unit="step", disable=None, dynamic_ncols=True)


if __name__ == "__main__":
    sys.exit(main())
