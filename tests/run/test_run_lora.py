"""A run whose experts are low-rank deltas, from the command line to the report."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import run_module
from typer.testing import CliRunner

from megaxelm.cli import app
from megaxelm.files import is_model_folder, write_json
from megaxelm.loaded import model_sources
from megaxelm.model.hub import load_pretrained, open_pretrained
from megaxelm.recipe import load_recipe
from megaxelm.run import MARKER, RunFolder
from megaxelm.stages import Stages

SETTINGS = ["experts.kind=lora", "experts.lora.rank=4", "experts.lora.lr=0.03", "ensemble.fallback=seed"]


def test_an_adapter_counts_as_an_export(tmp_path: Path) -> None:
    folder = tmp_path / "experts" / "a"
    (folder / "export").mkdir(parents=True)
    write_json(folder / MARKER, {"settings": {}, "inputs": {}, "sources": {}, "fingerprint": "f", "weights": "w"})
    run = RunFolder(tmp_path)
    assert run.marker("experts/a") is None and not is_model_folder(folder / "export")
    (folder / "export" / "adapter_config.json").write_text("{}")
    assert run.marker("experts/a") is not None and is_model_folder(folder / "export")


def test_a_seed_that_is_an_adapter_depends_on_its_base_too(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, name in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        folder.mkdir()
        (folder / name).write_text(name)
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
    before = model_sources(adapter)
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors", "base/config.json", "base/model.safetensors"}
    assert set(model_sources(base)) == {"config.json", "model.safetensors"}
    (base / "model.safetensors").write_text("another")
    assert [name for name, value in model_sources(adapter).items() if before[name] != value] == ["base/model.safetensors"]


def export(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.mark.slow
def test_a_whole_run_of_deltas(indexed_run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(indexed_run / "recipe.yaml", SETTINGS)
    said: list[str] = []
    assert Stages(RunFolder(indexed_run), recipe, say=said.append, check_sources=False).run()
    said.clear()
    assert not Stages(RunFolder(indexed_run), recipe, say=said.append, check_sources=False).run()
    results = json.loads((indexed_run / "evaluation" / "results.json").read_text())
    assert results and (indexed_run / "report" / "index.html").exists()
    assert sorted(path.parent.name for path in indexed_run.glob("ensemble/experts/*/adapter_config.json")) == ["bg-en", "de-ru"]

    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    name, folder = "bg-en", indexed_run / "experts" / "bg-en"
    assert "a Hugging Face checkpoint of `bg-en` in float32" in export(
        indexed_run, "--expert", name, "--output", whole, "--dtype", "float32"
    )
    printed = export(indexed_run, "--expert", name, "--output", adapter, "--to", "adapter", "--dtype", "float32")
    assert "an adapter for peft of `bg-en`" in printed and f"its base is {indexed_run}/experts/seed/export" in printed
    export(folder / "checkpoints", "--output", tmp_path / "again", "--to", "adapter", "--dtype", "float32")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    merged, seed = open_pretrained(whole), open_pretrained(indexed_run / "experts" / "seed" / "export")
    decoder = load_pretrained(folder / "export")
    for key, parameter in decoder.named_parameters():
        assert torch.equal(parameter, merged.weight(key)), key
    assert not torch.equal(merged.weight("layers.0.mlp.up.weight"), seed.weight("layers.0.mlp.up.weight"))

    moved = tmp_path / "moved"
    shutil.move(indexed_run, moved)
    done = run_module("megaxelm.cli", "generate", str(moved), "--prompt", "the house", "--max-new-tokens", "4")
    assert done.returncode == 0 and "mean weights: bg-en" in done.stderr, done.stderr
    (moved / "ensemble" / "experts" / "seed" / "config.json").unlink()
    done = run_module("megaxelm.cli", "generate", str(moved), "--prompt", "the house")
    assert done.returncode == 2 and "Traceback" not in done.stderr

    again = Stages(RunFolder(moved), load_recipe(moved / "recipe.yaml", ["experts.lora.rank=3"]), say=said.append, check_sources=False)
    reason = RunFolder(moved).status("experts/bg-en", again.made_from("experts/bg-en"))
    assert reason is not None and "lora.rank 4 -> 3" in reason
    assert RunFolder(moved).status("experts/dense", again.made_from("experts/dense")) is None
    whole_again = load_recipe(moved / "recipe.yaml", ["experts.kind=full", "experts.lora={}"])
    stages = Stages(RunFolder(moved), whole_again, say=said.append, check_sources=False)
    assert RunFolder(moved).status("experts/dense", stages.made_from("experts/dense")) is None
    assert RunFolder(moved).status("experts/bg-en", stages.made_from("experts/bg-en")) is not None
