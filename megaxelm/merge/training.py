"""A merged model trained further, by the project's own training: on the whole corpus' index, with DeepSpeed, checkpoints and resumption.

The training lies in `merged/.training/<rung>/`, a run of one model whose corpus, tokenizer and index are links to the run's. `job.json`
says what is trained: routers alone, everything, or a student by distillation. When it is done its export becomes the rung.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megaxelm.errors import MergeError
from megaxelm.files import read_json, write_json
from megaxelm.merge.rungs import close_rung, drop_training, training_folder
from megaxelm.recipe import Recipe, result_settings
from megaxelm.run import MARKER, MadeFrom, RunFolder
from megaxelm.train.ds_config import check_ds_config, find_ds_config
from megaxelm.train.launch import LaunchOptions, train_members
from megaxelm.train.members import Member, plan_members

JOB = "job.json"
_LINKED = ("corpus", "tokenizer", "index", "ensemble")
_START = "start"


@dataclass(frozen=True)
class Job:
    """What is trained.

    `what`: `routers` (of a mixture-of-experts model, the rest stays as it is), `all` parameters on the labels, or `distilled`: all
    parameters on the mixture's predictions. `router`, `top_m`: of the mixture. `label_weight`: share of the labels in the loss of
    distillation.
    """

    what: Literal["routers", "all", "distilled"]
    steps: int
    router: str | None = None
    top_m: int | None = None
    label_weight: float = 0.0


def training_recipe(recipe: Recipe, job: Job) -> Recipe:
    """The recipe of the training: where only routers are trained, without weight decay, which would change what has no gradient.

    Raises:
        MergeError: settings that this training cannot have.
    """
    train = recipe.train
    if job.steps < 1:
        raise MergeError(f"steps = {job.steps}: choose at least 1")
    if job.what == "distilled" and train.sequence_parallel > 1:
        raise MergeError(
            f"train.sequence_parallel = {train.sequence_parallel} with --into distilled: a router needs the whole text; give "
            "--set train.sequence_parallel=1"
        )
    if train.compile and job.what != "distilled":
        raise MergeError(
            "train.compile = true: which experts of a layer run follows from the text, which cannot be compiled ahead; give "
            "--set train.compile=false"
        )
    if job.what == "routers" and train.weight_decay:
        train = train.model_copy(update={"weight_decay": 0.0})
    return recipe.model_copy(update={"train": train})


def student(recipe: Recipe, job: Job, name: str) -> Member:
    """The model that is trained: the tokens of a step are those of the dense model.

    Raises:
        MergeError: a warm-up that is not below the steps.
    """
    if recipe.train.warmup_steps >= job.steps:
        raise MergeError(
            f"train.warmup_steps = {recipe.train.warmup_steps} must be below the {job.steps} steps of this training: give more steps, or "
            "--set train.warmup_steps=0"
        )
    whole = recipe.model_copy(update={"experts": recipe.experts.model_copy(update={"dense": True, "allow_unequal_tokens": True})})
    # Any number of clusters that divides the batch gives the dense model the same.
    dense = plan_members(whole, ["cluster"])["dense"]
    return replace(dense, name=name, parent=_START, steps=job.steps)


def training_settings(recipe: Recipe, job: Job, name: str) -> dict[str, Any]:
    """What the result of a training depends on, for the record of the rung."""
    member = {key: value for key, value in asdict(student(recipe, job, name)).items() if key not in ("name", "parent", "kind", "clusters")}
    train = {key: value for key, value in result_settings(recipe.train).items() if key not in member}
    dropout = {key: getattr(recipe.model, key) for key in ("dropout", "attention_dropout")}
    return {"job": asdict(job), "member": member, "train": train, "model": dropout}


def train_rung(
    run: RunFolder, recipe: Recipe, name: str, kind: str, job: Job, start: Path, made_from: dict[str, Any], facts: dict[str, Any]
) -> Path:
    """Train from the checkpoint folder `start` and make the result the rung `name`; a training that was stopped goes on.

    Raises:
        TrainError, Preempted, Interrupted: as `train_members`.
    """
    check_ds_config(find_ds_config(recipe.train.deepspeed_config), recipe.train)
    folder = training_folder(run, name)
    member = student(recipe, job, name)
    wanted = {"made_from": made_from, "job": asdict(job)}
    if (folder / JOB).is_file() and read_json(folder / JOB, made_from=dict, job=dict) != wanted:
        drop_training(run, name)
    if not (folder / JOB).is_file():
        _lay_out(run, folder, start)
        write_json(folder / JOB, wanted)
    own = RunFolder(folder)
    own.write_recipe(recipe)
    own.open_expert(name, trained_from(made_from))
    if not (own.expert(name) / MARKER).exists():
        train_members(own, recipe, [member], LaunchOptions(module="megaxelm.merge.worker"))
    export = own.expert(name) / "export"
    metrics = own.expert(name) / "metrics.jsonl"
    if metrics.is_file():
        shutil.copyfile(metrics, export / "training.jsonl")
    made = close_rung(run, name, kind, made_from, facts | {"training_tokens": member.tokens}, export)
    drop_training(run, name)
    return made


def trained_from(made_from: dict[str, Any]) -> MadeFrom:
    """What the folder of the training is marked with."""
    return MadeFrom({"merge": made_from})


def _lay_out(run: RunFolder, folder: Path, start: Path) -> None:
    """A run of one model: links to what it reads, relative, so that the run may be moved."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "experts" / _START).mkdir(parents=True)
    for name in _LINKED:
        os.symlink(os.path.relpath(run.folder(name).resolve(), folder.resolve()), folder / name)
    shutil.copytree(start, folder / "experts" / _START / "export")
