"""What is handed to Slurm for a run, with an `sbatch` that writes down what it is asked."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_run import tiny_recipe

from megaxelm.errors import MegaxelmError, StageError, TrainError
from megaxelm.files import read_json
from megaxelm.recipe import Recipe, load_recipe, parse_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages
from megaxelm.submit import JOBS, Job, SubmitOptions, plan_jobs, plan_text, submit_jobs

SBATCH = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in *refused*) echo "sbatch: error: Invalid partition" >&2; exit 1 ;; esac
wc -l < "$CALLS"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(SBATCH)
    (tools / "squeue").write_text('#!/bin/sh\necho "$QUEUED"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def finish(run: RunFolder, recipe: Recipe, *names: str) -> None:
    """Let models look trained."""
    stages = Stages(run, recipe, check_sources=False)
    for name in names:
        (run.expert(name) / "export").mkdir(parents=True)
        (run.expert(name) / "export" / "config.json").write_text("{}")
        run.close_expert(name, stages.made_from(f"experts/{name}"), "0")


def commands(jobs: list[Job]) -> dict[str, str]:
    return {job.name: " ".join(job.command(None)) for job in jobs}


def test_a_new_run_is_prepared_trained_and_evaluated_in_that_order(tmp_path: Path, indexed_run: Path, calls: Path) -> None:
    recipe = load_recipe(indexed_run / "recipe.yaml")
    run = RunFolder(tmp_path / "fresh" / "tiny")
    options = SubmitOptions(
        nodes=2, gpus_per_node=2, partition="gpu", account="lab", time="1:00:00", stage=Path("/local"), extra=["--mem=0"]
    )
    jobs = plan_jobs(run, recipe, options)
    assert not run.path.exists(), "a plan writes nothing"
    numbers = submit_jobs(run, recipe, jobs)
    assert numbers == {"prepare": "1", "seed": "2", "experts": "3", "evaluate": "4"}
    lines = calls.read_text().splitlines()
    assert all("--partition=gpu --account=lab --time=1:00:00 --mem=0" in line for line in lines)
    assert "--dependency" not in lines[0] and f"prepare.sbatch {run.path}/recipe.yaml --runs {run.path.parent}" in lines[0]
    for number, line in enumerate(lines[1:], 1):
        assert f"--dependency=afterok:{number} --kill-on-invalid-dep=yes" in line
    for line in lines[1:3]:
        assert "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2" in line and line.endswith("--stage /local")
    assert "--array=0-2" in lines[2], "dense and two experts"
    assert "--gpus-per-node=1" in lines[3] and f"evaluate.sbatch {run.path}" in lines[3]
    assert RunFolder(run.path).recipe() == recipe, "the jobs read what was submitted"
    assert list(read_json(run.path / JOBS)["jobs"]) == ["prepare", "seed", "experts", "evaluate"]


def test_what_is_fresh_is_left_out(indexed_run: Path) -> None:
    run, recipe = RunFolder(indexed_run), load_recipe(indexed_run / "recipe.yaml")
    assert list(commands(plan_jobs(run, recipe, SubmitOptions()))) == ["seed", "experts", "evaluate"]
    finish(run, recipe, "seed", "bg-en")
    jobs = plan_jobs(run, recipe, SubmitOptions(gpus_per_node=0))
    assert list(commands(jobs)) == ["experts", "evaluate"]
    assert "--array=0,2" in commands(jobs)["experts"] and jobs[0].members == {"0": "dense", "2": "de-ru"}
    assert "gpus" not in "".join(commands(jobs).values())
    finish(run, recipe, "dense", "de-ru")
    assert list(commands(plan_jobs(run, recipe, SubmitOptions()))) == ["evaluate"]
    longer = load_recipe(indexed_run / "recipe.yaml", ["train.steps=7"])
    assert list(commands(plan_jobs(run, longer, SubmitOptions()))) == ["seed", "experts", "evaluate"]
    assert "seed      sbatch --parsable --nodes=1" in plan_text(run, plan_jobs(run, longer, SubmitOptions()))


def test_jobs_that_could_not_work_are_not_submitted(
    tmp_path: Path, indexed_run: Path, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = RunFolder(indexed_run), load_recipe(indexed_run / "recipe.yaml")

    def refused(words: str, kind: type[MegaxelmError], options: SubmitOptions, of: Recipe = recipe, where: RunFolder = run) -> None:
        with pytest.raises(kind) as caught:
            submit_jobs(where, of, plan_jobs(where, of, options))
        assert words in str(caught.value)

    refused("8 sequences a step, which 3 ranks cannot share", TrainError, SubmitOptions(gpus_per_node=3))
    corpus = Path(recipe.corpus.train[0].files[0]).parent
    unknown = parse_recipe(tiny_recipe(corpus, clusters={"partitioner": "language", "k": None}, train={"batch_sequences": 8}))
    refused("the number of experts is not known before", StageError, SubmitOptions(), unknown, RunFolder(tmp_path / "new"))
    refused("sbatch refused the job `seed`: sbatch: error: Invalid partition", TrainError, SubmitOptions(partition="refused"))
    assert not calls.read_text().count("experts")
    submit_jobs(run, recipe, plan_jobs(run, recipe, SubmitOptions()))
    monkeypatch.setenv("QUEUED", f"99_1\n{read_json(run.path / JOBS)['jobs']['experts']['job']}_2")
    refused("are still in the queue; wait for them, or `scancel", TrainError, SubmitOptions())
    monkeypatch.setenv("PATH", str(Path(shutil.which("python3") or "").parent / "none"))
    refused("sbatch: not found on the PATH", TrainError, SubmitOptions())


def test_scripts_are_sound_and_say_what_they_want(tmp_path: Path) -> None:
    import subprocess

    from megaxelm.submit import find_script

    for name, words in {"prepare": "RECIPE", "seed": "RUN", "experts": "--array=0-K", "evaluate": "RUN"}.items():
        script = find_script(name)
        text = script.read_text()
        assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text
        done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
        assert done.returncode != 0 and "usage: " in done.stderr and words in done.stderr
