"""The whole of it, as a user runs it: from a corpus to the report, and what a changed recipe makes again."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_run import run_module, tiny_recipe, write_corpus

from megaxelm.errors import StageError
from megaxelm.ingredients import STAGES
from megaxelm.recipe import load_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages

SETTINGS = {
    "seed": {"steps": 4, "lr": 1e-2},
    "train": {"steps": 4, "schedule": "constant", "concurrent_experts": 2},
    "evaluation": {"max_documents": 3, "routers": ["language", "posterior"]},
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus/, recipe.yaml and runs/tiny, run to the end by the command line."""
    base = tmp_path_factory.mktemp("made")
    (base / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(write_corpus(base / "corpus"), **SETTINGS)))
    done = run_module("megaxelm.cli", "run", str(base / "recipe.yaml"), "--runs", str(base / "runs"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "training tokens: seed 1,024; dense 1,024; 2 experts x 512 = 1,024 (equal); in all 3,072" in done.stdout
    return base


def stale(base: Path, *overrides: str) -> list[str]:
    """Units that would be made again under a changed recipe."""
    stages = Stages(RunFolder(base / "runs" / "tiny"), load_recipe(base / "recipe.yaml", overrides))
    return [unit for stage in STAGES for unit, made_from in stages.units(stage).items() if stages.folder.status(unit, made_from)]


def test_the_run_directory_holds_what_the_architecture_says(made: Path) -> None:
    run = made / "runs" / "tiny"
    for name in ("recipe.yaml", "lineage.json", "account.json", "evaluation/results.json", "report/index.html", "ensemble/config.json"):
        assert (run / name).is_file(), name
    lineage = json.loads((run / "lineage.json").read_text())["experts"]
    assert {name: item["parent"] for name, item in lineage.items()} == {"seed": None, "dense": "seed", "bg-en": "seed", "de-ru": "seed"}
    assert lineage["bg-en"]["languages"] == ["bg", "en"] and lineage["bg-en"]["tokens"] == 512
    assert len({item["weights"] for item in lineage.values()}) == 4
    hidden = [path.name for path in run.rglob(".*") if path.name != ".locks"]
    assert hidden == [], "nothing temporary is left"


def test_a_second_run_does_nothing_and_says_so(made: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in (made / "runs").rglob("*")
        if path.is_file() and path.parent.name != ".locks" and path.name != "recipe.yaml"
    }
    done = run_module("megaxelm.cli", "run", str(made / "recipe.yaml"), "--runs", str(made / "runs"))
    assert done.returncode == 0 and "everything is up to date; nothing to do" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.log_every=3", []),
        ("evaluation.max_documents=2", ["evaluation", "report"]),
        ("ensemble.temperature=1", ["ensemble", "evaluation", "report"]),
        ("train.lr=2e-3", ["experts/dense", "experts/bg-en", "experts/de-ru", "ensemble", "evaluation", "report"]),
        # Other clusters do not touch the seed and the dense model, nor an expert whose languages stay together.
        ("clusters.k=4", ["clusters", "index", "ensemble", "evaluation", "report"]),
        ("clusters.tfidf.dimensions=20", ["ensemble", "evaluation", "report"]),
        ("seed.lr=2e-3", ["experts/seed", "experts/dense", "experts/bg-en", "experts/de-ru", "ensemble", "evaluation", "report"]),
    ],
)
def test_a_changed_recipe_makes_again_what_depends_on_the_change(made: Path, override: str, expected: list[str]) -> None:
    assert stale(made, override) == expected


def test_a_changed_tokenizer_makes_everything_after_the_corpus_again(made: Path) -> None:
    assert stale(made, "tokenizer.vocab_size=420")[0] == "tokenizer"
    assert "experts/seed" in stale(made, "tokenizer.vocab_size=420") and "corpus" not in stale(made, "tokenizer.vocab_size=420")


def test_an_expert_whose_export_was_removed_is_made_again(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    shutil.copy(made / "recipe.yaml", tmp_path / "copy" / "recipe.yaml")
    shutil.rmtree(tmp_path / "copy" / "runs" / "tiny" / "experts" / "bg-en" / "export")
    assert stale(tmp_path / "copy") == ["experts/bg-en", "ensemble", "evaluation", "report"]


def test_what_branches_depends_on_its_parents_weights(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    marker = tmp_path / "copy" / "runs" / "tiny" / "experts" / "seed" / "stage.json"
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps(content | {"weights": "trained again, on another device"}))
    assert stale(tmp_path / "copy") == ["experts/dense", "experts/bg-en", "experts/de-ru", "ensemble", "evaluation", "report"]


def test_a_changed_source_file_is_named(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    recipe = load_recipe(made / "recipe.yaml", [f"corpus.train={copy}/corpus/*.jsonl"])
    stages = Stages(RunFolder(copy / "runs" / "tiny"), recipe)
    with open(copy / "corpus" / "de.jsonl", "a") as file:
        file.write('{"id": "x", "language": "de", "text": "noch ein Haus"}\n')
    reason = stages.folder.status("corpus", stages.made_from("corpus"))
    assert reason is not None and "source changed: de.jsonl" in reason


def test_verbs_that_use_a_run_do_not_need_its_sources(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs" / "tiny", tmp_path / "moved")
    (made / "corpus").rename(made / "gone")
    try:
        done = run_module("megaxelm.cli", "evaluate", str(tmp_path / "moved"), "--set", "evaluation.max_documents=2")
        assert done.returncode == 0, done.stderr
        assert "max_documents 3 -> 2" in done.stdout and "own expert" in done.stdout
        done = run_module("megaxelm.cli", "run", str(made / "recipe.yaml"), "--runs", str(tmp_path), "--set", "name=moved")
        assert done.returncode == 2 and "corpus/*.jsonl" in done.stderr
    finally:
        (made / "gone").rename(made / "corpus")


@pytest.mark.parametrize("fallback", ["seed", "dense"])
def test_the_ensemble_is_made_from_its_fallback(fallback: str, indexed_run: Path) -> None:
    recipe = RunFolder(indexed_run).recipe()
    without = Stages(RunFolder(indexed_run), recipe).units("ensemble")["ensemble"].inputs
    changed = recipe.model_copy(update={"ensemble": recipe.ensemble.model_copy(update={"fallback": fallback})})
    inputs = Stages(RunFolder(indexed_run), changed).units("ensemble")["ensemble"].inputs
    assert set(inputs) - set(without) == {f"experts/{fallback}"} and set(without) < set(inputs)


def test_only_one_stage_needs_those_before_it(indexed_run: Path) -> None:
    stages = Stages(RunFolder(indexed_run), RunFolder(indexed_run).recipe())
    with pytest.raises(StageError, match="experts/seed is missing; make it first: megaxelm run RECIPE --until seed"):
        stages.run(only="evaluation")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"until": "nonsense"}, "choose one of corpus"),
        ({"start": "report", "until": "index"}, "nothing would be made"),
        ({"only": "index", "until": "seed"}, "--only"),
    ],
)
def test_a_wrong_choice_of_stages_is_an_error(indexed_run: Path, choice: dict[str, str], words: str) -> None:
    with pytest.raises(StageError, match=words):
        Stages(RunFolder(indexed_run), RunFolder(indexed_run).recipe()).run(**choice)


def test_from_makes_a_fresh_stage_again(indexed_run: Path) -> None:
    stages = Stages(RunFolder(indexed_run), RunFolder(indexed_run).recipe(), say=lambda text: None)
    before = (indexed_run / "clusters" / "stage.json").stat().st_mtime_ns
    assert stages.run(start="clusters", until="index")
    assert (indexed_run / "clusters" / "stage.json").stat().st_mtime_ns > before
    assert not stages.run(until="index")


def test_an_exported_expert_generates_with_plain_transformers(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made / "runs" / "tiny" / "experts" / "bg-en" / "export"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    start = tokenizer("the old house", return_tensors="pt")
    written = model.generate(**start, max_new_tokens=8, do_sample=False)
    assert written.shape[1] > start["input_ids"].shape[1]
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith("the old house")


def test_generate_and_export_from_the_command_line(made: Path, tmp_path: Path) -> None:
    run = str(made / "runs" / "tiny")
    done = run_module("megaxelm.cli", "generate", run, "--prompt", "the old house", "--max-new-tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("the old house"), done.stderr
    done = run_module("megaxelm.cli", "generate", run, "--prompt", "x", "--router", "language", "--language", "xx")
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    done = run_module("megaxelm.cli", "export", run, "--expert", "dense", "--output", str(tmp_path / "out"), "--dtype", "float32")
    assert done.returncode == 0 and (tmp_path / "out" / "tokenizer.json").exists(), done.stderr
    done = run_module("megaxelm.cli", "export", run, "--expert", "nobody", "--output", str(tmp_path / "out2"))
    assert done.returncode == 2 and "bg-en, de-ru, dense, seed" in done.stderr
