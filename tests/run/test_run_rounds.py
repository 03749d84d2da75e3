"""A run with rounds: what is trained after what, what is made again, and the jobs on Slurm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fake_training import FakeTraining
from tiny_run import run_module, tiny_recipe, write_corpus

from megaxelm.errors import StageError, TrainError
from megaxelm.files import read_json, write_json
from megaxelm.ingredients import STAGES
from megaxelm.recipe import Recipe, load_recipe
from megaxelm.run import MadeFrom, RunFolder
from megaxelm.stages import Stages
from megaxelm.status import run_status
from megaxelm.submit import JOBS, SubmitOptions, plan_jobs, plan_text, submit_jobs

ROUNDS = ["clusters.k=4", "rounds=[{k: 1, steps: 1}, {k: 2, steps: 2}, {k: 4}]"]
FIRST, SECOND, LAST = ["round1-bg-de-en-ru"], ["round2-bg-en", "round2-de-ru"], ["bg", "de", "en", "ru"]


@pytest.fixture(scope="session")
def _run_with_rounds(tmp_path_factory: pytest.TempPathFactory, _indexed_run: Path) -> Path:
    folder = tmp_path_factory.mktemp("rounds") / "tiny"
    shutil.copytree(_indexed_run / "runs" / "tiny", folder)
    Stages(RunFolder(folder), load_recipe(folder / "recipe.yaml", ROUNDS), say=lambda text: None).run(until="index")
    return folder


@pytest.fixture
def run(_run_with_rounds: Path, tmp_path: Path) -> RunFolder:
    """A run of three rounds, made up to the token index."""
    shutil.copytree(_run_with_rounds, tmp_path / "tiny")
    return RunFolder(tmp_path / "tiny")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    made = FakeTraining()
    monkeypatch.setattr("megaxelm.train.launch.train_members", made)
    return made


def stages(run: RunFolder, *overrides: str, say: Callable[[str], None] = lambda text: None) -> Stages:
    return Stages(run, load_recipe(run.path / "recipe.yaml", overrides), say=say, check_sources=False)


def stale(run: RunFolder, *overrides: str) -> list[str]:
    made = stages(run, *overrides)
    units = [(unit, made_from) for stage in STAGES[:7] for unit, made_from in made.units(stage).items()]
    return [unit for unit, made_from in units if run.status(unit, made_from)]


def test_the_report_of_the_clusters_has_the_tree(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    report = read_json(run.folder("clusters") / "report.json")
    assert [list(level) for level in report["rounds"]["levels"]] == [FIRST, SECOND] and report["names"] == LAST
    from megaxelm.cluster.stage import show_report

    show_report(report)
    assert "round 2, 2 experts: bg-en (2 clusters); de-ru (2 clusters)" in capsys.readouterr().out


def test_rounds_train_one_after_the_other_from_weights_that_are_there(run: RunFolder, training: FakeTraining) -> None:
    said: list[str] = []
    assert stages(run, say=said.append).train_models(None)
    assert training.calls == [["seed"], FIRST, SECOND, ["dense", *LAST]], "the rounds do not wait for the dense model"
    assert (
        "training tokens: seed 1,536; dense 1,536; 1 experts x 256, then 2 experts x 256, then 4 experts x 192 = 1,536 (equal)" in said[0]
    )
    assert stale(run) == []
    assert not stages(run).train_models(None), "a second time there is nothing to do"


def test_a_failed_round_keeps_what_is_finished_and_the_next_start_goes_on(run: RunFolder, training: FakeTraining) -> None:
    training.failing = {"round2-de-ru"}
    with pytest.raises(TrainError, match="round2-de-ru: not trained"):
        stages(run).train_models(None)
    assert training.calls[-1] == SECOND, "no later round begins"
    assert set(read_json(run.path / "lineage.json")["experts"]) == {"seed", *FIRST, "round2-bg-en"}
    training.failing, training.calls = set(), []
    stages(run).train_models(None)
    assert training.calls == [["round2-de-ru"], ["dense", *LAST]]
    assert stale(run) == []


def test_one_expert_is_trained_with_its_line_alone(run: RunFolder, training: FakeTraining) -> None:
    stages(run).train_models("de")
    assert training.calls == [["seed"], FIRST, ["round2-de-ru"], ["de"]]
    with pytest.raises(StageError, match="`bg` branches from `round2-bg-en`, which is missing: train that first"):
        stages(run).open_for_training("bg")


def test_what_branches_is_made_again_with_its_parent(run: RunFolder, training: FakeTraining) -> None:
    stages(run).train_models(None)
    marker = run.expert("round2-bg-en") / "stage.json"
    write_json(marker, read_json(marker) | {"weights": "trained again, on another device"})
    assert stale(run) == ["experts/bg", "experts/en"]
    before = {stage: stages(run).units(stage)[stage].fingerprint for stage in ("ensemble", "evaluation")}
    write_json(marker, read_json(marker) | {"weights": "and again"})
    assert all(stages(run).units(stage)[stage].fingerprint != value for stage, value in before.items())


def test_a_change_of_the_rounds_makes_again_what_depends_on_it(run: RunFolder, training: FakeTraining) -> None:
    stages(run).train_models(None)
    experts = [f"experts/{name}" for name in (*FIRST, *SECOND, *LAST)]
    assert stale(run, "rounds=[{k: 1, steps: 1}, {k: 2, steps: 3}, {k: 4}]") == experts[1:], "the clusters stay, and so do earlier rounds"
    assert stale(run, "rounds=[{k: 1, steps: 1}, {k: 2, steps: 2}, {k: 4, lr: 0.5}]") == [f"experts/{name}" for name in LAST]
    with pytest.raises(StageError, match="not made for rounds of k = 2, 4; make them again"):
        stale(run, "rounds=[{k: 2}, {k: 4}]")
    made = stages(run, "rounds=[{k: 2}, {k: 4}]")
    assert "rounds" in (run.status("clusters", made.made_from("clusters")) or "")


def test_a_run_without_rounds_is_what_it_was(indexed_run: Path) -> None:
    folder = RunFolder(indexed_run)
    settings = folder.marker("clusters")["settings"]  # type: ignore[index]
    assert "rounds" not in settings and "rounds" not in read_json(indexed_run / "clusters" / "report.json")
    assert stages(folder, "rounds=[{k: 2}]").made_from("clusters").settings == settings
    assert "rounds" in stages(folder, "rounds=[{k: 1}, {k: 2}]").made_from("clusters").settings


def test_the_distances_behind_a_tree_of_single_languages_are_a_source(run: RunFolder, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(",bg,de\nbg,0,1\nde,1,0\n")

    def made_from(*overrides: str) -> MadeFrom:
        given = ["clusters.partitioner=language", f"clusters.typology.distances={table}", *overrides]
        return Stages(run, load_recipe(run.path / "recipe.yaml", given)).made_from("clusters")

    assert set(made_from().sources) == {"table.csv"} and not made_from("rounds=[]").sources
    assert made_from("clusters.typology.linkage=single").settings != made_from().settings


def test_the_ensemble_is_made_from_the_last_round(run: RunFolder, training: FakeTraining) -> None:
    made = stages(run)
    leaves = {f"experts/{name}" for name in LAST}
    assert {unit for unit in made.made_from("ensemble").inputs if unit.startswith("experts/")} == leaves
    assert {unit for unit in made.made_from("evaluation").inputs if unit.startswith("experts/")} == leaves | {
        "experts/seed",
        "experts/dense",
    }


def jobs_of(run: RunFolder, recipe: Recipe, options: SubmitOptions | None = None) -> dict[str, tuple[str, tuple[str, ...], dict[str, str]]]:
    found = {}
    for job in plan_jobs(run, recipe, options or SubmitOptions(gpus_per_node=0)):
        array = next((argument.removeprefix("--array=") for argument in job.arguments if argument.startswith("--array")), "")
        found[job.name] = (array, job.after, job.members)
    return found


def test_slurm_gets_an_array_for_each_round(run: RunFolder, training: FakeTraining, tmp_path: Path) -> None:
    recipe = run.recipe()
    found = jobs_of(run, recipe)
    assert {name: (array, after) for name, (array, after, _) in found.items()} == {
        "seed": ("", ()), "dense": ("0", ("seed",)), "round1": ("1", ("seed",)), "round2": ("2-3", ("round1",)),
        "round3": ("4-7", ("round2",)), "evaluate": ("", ("round3", "dense")),
    }  # fmt: skip
    assert found["round2"][2] == {"2": "round2-bg-en", "3": "round2-de-ru"}
    fresh = jobs_of(RunFolder(tmp_path / "new"), recipe)
    assert {name: value[:2] for name, value in fresh.items() if name != "prepare"} == {
        name: (array, after if name != "seed" else ("prepare",)) for name, (array, after, _) in found.items()
    }, "before the clusters are made the tasks are the same"
    text = plan_text(run, plan_jobs(run, recipe, SubmitOptions(gpus_per_node=0)))
    assert "--dependency=afterok:<round3>:<dense>" in text
    for name in ("seed", *FIRST, "dense", "round2-bg-en"):
        training.train(run, recipe, name)
    partial = jobs_of(run, recipe)
    assert {name: value[:2] for name, value in partial.items()} == {
        "round2": ("3", ()), "round3": ("4-7", ("round2",)), "evaluate": ("", ("round3",))
    }  # fmt: skip


def test_the_jobs_know_their_numbers(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text('#!/bin/sh\necho "$*" >> "$CALLS"\nwc -l < "$CALLS"\n')
    (tools / "squeue").write_text("#!/bin/sh\nprintf '4_3|RUNNING|None|n1\\n5_4|PENDING|Dependency|\\n'\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    numbers = submit_jobs(run, run.recipe(), plan_jobs(run, run.recipe(), SubmitOptions(gpus_per_node=0)))
    assert numbers == {"seed": "1", "dense": "2", "round1": "3", "round2": "4", "round3": "5", "evaluate": "6"}
    lines = (tmp_path / "calls").read_text().splitlines()
    waits = [next((word.split(":", 1)[1] for word in line.split() if word.startswith("--dependency")), "") for line in lines]
    assert waits == ["", "1", "1", "3", "4", "5:2"]
    assert "round2-%A_%a.log" in lines[3] and "evaluate-%j.log" in lines[5]
    assert read_json(run.path / JOBS)["jobs"]["round3"]["members"]["7"] == "ru"
    said = {member.name: member.slurm for member in run_status(run)[1]}
    assert said["round2-de-ru"] == "job 4_3 running on n1" and said["bg"] == "job 5_4 pending (Dependency)" and said["dense"] == ""


def test_status_says_when_the_clusters_are_of_other_rounds(run: RunFolder) -> None:
    run.write_recipe(load_recipe(run.path / "recipe.yaml", ["rounds=[{k: 2}, {k: 4}]"]))
    lines, members = run_status(run)
    assert members == [] and "not made for rounds of k = 2, 4" in lines[-1]


@pytest.mark.slow
def test_a_run_with_rounds_from_the_command_line_goes_on_after_the_first(tmp_path: Path) -> None:
    base = tmp_path / "base"
    quick = {"sequence_length": 32, "steps": 4, "batch_sequences": 4, "concurrent_experts": 2}
    tree = tiny_recipe(
        write_corpus(base / "corpus"), seed={"steps": 2}, train=quick, experts={"dense": False},
        evaluation={"max_documents": 2, "routers": ["language"]},
    )  # fmt: skip
    (base / "recipe.yaml").write_text(yaml.safe_dump(tree | {"rounds": [{"k": 1, "share": 0.5}, {"k": 2}]}))
    command = ["megaxelm.cli", "run", str(base / "recipe.yaml"), "--runs", str(base / "runs")]
    done = run_module(*command, "--until", "index")
    assert done.returncode == 0, done.stderr
    run = base / "runs" / "tiny"
    done = run_module("megaxelm.cli", "train", str(run), "--expert", "round1-bg-de-en-ru")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (run / "experts").iterdir()) == ["round1-bg-de-en-ru", "seed"]
    done = run_module(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round1-bg-de-en-ru: fresh" in done.stdout and "bg-en: making (missing)" in done.stdout
    entries = read_json(run / "lineage.json")["experts"]
    assert (
        entries["de-ru"]["parent"] == "round1-bg-de-en-ru"
        and entries["de-ru"]["parent_weights"] == entries["round1-bg-de-en-ru"]["weights"]
    )
    assert entries["de-ru"]["tokens"] == 2 * 2 * 32 and entries["de-ru"]["tokens_seen"] == 2 * 4 * 32 + 2 * 4 * 32 + 2 * 2 * 32
    results = read_json(run / "evaluation" / "results.json")
    assert set(results["experts"]) == {"bg-en", "de-ru"} and json.loads((run / "ensemble" / "config.json").read_text())
    page = (run / "report" / "index.html").read_text()
    assert "trained in 2 rounds" in page and "round1-bg-de-en-ru" in page
    done = run_module("megaxelm.cli", "lineage", str(run), "--check")
    assert done.returncode == 0 and "4 models checked" in done.stdout, done.stdout + done.stderr
