"""The commands on a run that is really trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from growing import grow_recipe, write_new_languages
from tiny_run import run_module, write_corpus

from megaxelm.files import read_json
from megaxelm.model.hub import weights_hash
from megaxelm.recipe import parse_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages


@pytest.mark.slow
def test_a_language_is_grown_compared_and_dropped_by_command(tmp_path: Path, really_train: None) -> None:
    write_corpus(tmp_path / "corpus")
    write_new_languages(tmp_path / "new", documents=60)
    run = tmp_path / "runs" / "tiny"
    recipe = parse_recipe(grow_recipe(tmp_path, train={"batch_sequences": 16, "steps": 12}))
    Stages(RunFolder(run), recipe, say=lambda text: None).run(until="experts")
    before = {path.parent.name: weights_hash(path) for path in run.glob("experts/*/export")}

    done = run_module("megaxelm.cli", "grow", str(run), "--languages", "az", "--lapt", "--steps", "30", "--set", "train.lr=2e-2")
    assert done.returncode == 0, done.stderr
    assert "donor of az: de-ru" in done.stdout and "warning: poor fit of the tokenizer" in done.stdout
    results = read_json(run / "evaluation" / "results.json")
    experts = {name: found["az"] for name, found in results["experts"].items()}
    assert experts["az"] < min(experts["de-ru"], experts["bg-en"]) - 0.5
    assert results["models"]["lapt:az-lapt-dense"]["languages"]["az"]["bits_per_byte"] < experts["de-ru"] - 0.5
    assert (run / "report" / "index.html").is_file()
    assert {path.parent.name: weights_hash(path) for path in run.glob("experts/*/export")} == before

    done = run_module("megaxelm.cli", "grow", str(run), "--languages", "az", "--lapt", "--steps", "30", "--set", "train.lr=2e-2")
    assert done.returncode == 0 and "grown already and fresh; nothing to do" in done.stdout, done.stderr
    done = run_module("megaxelm.cli", "grow", str(run), "--languages", "ru")
    assert done.returncode == 2 and "ru has an expert already" in done.stderr and "Traceback" not in done.stderr
    done = run_module("megaxelm.cli", "lineage", str(run), "--check")
    assert done.returncode == 0 and "az-lapt-dense" in done.stdout, done.stderr
    done = run_module("megaxelm.cli", "drop", str(run), "--languages", "az")
    assert done.returncode == 0 and "--languages az --undo" in done.stdout, done.stderr
    assert "az" not in [row["code"] for row in read_json(run / "evaluation" / "results.json")["languages"]]
    assert (run / "grown" / "az" / "experts" / "az" / "export").is_dir()
