"""Train one merged model: what `megaxelm merge` starts on every rank, as `megaxelm.train` is for the models of a run."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaxelm.console import run_guarded
from megaxelm.files import read_json
from megaxelm.merge.training import JOB, Job, student, trained_from
from megaxelm.recipe import load_recipe
from megaxelm.run import RunFolder
from megaxelm.train.__main__ import train_open
from megaxelm.train.preemption import catch_signals

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder
    from megaxelm.train.setting import Setting
    from megaxelm.train.steps import Steps


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megaxelm.merge.worker", description="Train one merged model.")
    parser.add_argument("run", help="the folder of the training")
    parser.add_argument("--expert", required=True, help="name of the merged model")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; the environment is used")
    options = parser.parse_args(arguments)
    catch_signals()
    rank = os.environ.get("RANK", "0")
    return run_guarded(lambda: _train(Path(options.run), options.expert), prefix="" if rank == "0" else f"rank {rank}: ")


def _train(folder: Path, name: str) -> None:
    wanted = read_json(folder / JOB, made_from=dict, job=dict)
    job, recipe = Job(**wanted["job"]), load_recipe(folder / "recipe.yaml")
    prepare = only_routers if job.what == "routers" else None

    def loop(setting: Setting, bar: Any) -> None:
        from megaxelm.train import loop

        loop.train(setting, bar, make_steps(setting, folder, job), prepare)

    train_open(RunFolder(folder), recipe, student(recipe, job, name), trained_from(wanted["made_from"]), train=loop)


def make_steps(setting: Setting, folder: Path, job: Job) -> Callable[..., Steps]:
    """The steps of a job: those of any training, or of a distillation from the run's ensemble, which every rank holds whole."""
    from megaxelm.train.steps import Steps

    if job.what != "distilled":
        return Steps
    import torch

    from megaxelm.ensemble.folder import load_ensemble
    from megaxelm.merge.distill import DistillSteps, MixtureTeacher
    from megaxelm.model.config import DecoderConfig
    from megaxelm.train.forward import forward_options

    dtype = torch.float32 if setting.recipe.train.precision == "fp32" else torch.bfloat16
    ensemble = load_ensemble(folder / "ensemble", dtype, setting.device)
    decoders = [ensemble.decoder(number) for number in range(len(ensemble.experts))]
    shape: DecoderConfig = decoders[0].config
    options = forward_options(setting.recipe.train, shape, setting.device)
    teacher = MixtureTeacher(decoders, ensemble.router(job.router), job.top_m, options)
    return functools.partial(DistillSteps, teacher=teacher, label_weight=job.label_weight)


def only_routers(model: Decoder) -> None:
    """Let no gradient reach anything but the routers.

    All parameters stay in the optimiser, so that every ZeRO stage and its checkpoints are those of any training; without a gradient and
    without weight decay Adam leaves them as they are.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith(".mlp.router.weight"):
            parameter.register_hook(lambda gradient: gradient.zero_())


if __name__ == "__main__":
    sys.exit(main())
