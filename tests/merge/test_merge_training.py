"""Merged models that are trained further: a training that was stopped goes on, and what is trained is what was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megaxelm.errors import MergeError, Preempted
from megaxelm.merge import training
from megaxelm.merge.make import MergeOptions, Merging
from megaxelm.merge.training import Job, student, training_recipe
from megaxelm.merge.worker import only_routers
from megaxelm.model.config import DecoderConfig
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_pretrained, open_pretrained
from megaxelm.recipe import Recipe
from megaxelm.run import MARKER, RunFolder
from megaxelm.train.metrics import read_metrics

SMALL = {"top_k": 2, "sample_tokens": 800}


def changed_train(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})


def test_only_routers_get_gradients_and_adam_leaves_the_rest() -> None:
    config = DecoderConfig("mixtral", 64, 16, 2, 2, 2, 8, 24, 32, num_experts=3, experts_per_token=2)
    model = Decoder(config)
    model.initialise(0)
    only_routers(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    tokens = torch.arange(10)
    for _ in range(2):
        optimiser.zero_grad()
        model(tokens, tokens, torch.tensor([0, 10]), labels=tokens).loss_sum.backward()
        optimiser.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"layers.0.mlp.router.weight", "layers.1.mlp.router.weight"}


def test_the_student_gets_the_tokens_of_the_dense_model_and_reads_in_another_order_than_the_seed(recipe: Recipe) -> None:
    member = student(recipe, Job("all", 7), "mine")
    assert (member.name, member.steps, member.batch_sequences, member.clusters) == ("mine", 7, recipe.train.batch_sequences, None)
    assert member.sample_seed(3) == 7
    decayed = changed_train(recipe, weight_decay=0.1)
    assert training_recipe(decayed, Job("routers", 1)).train.weight_decay == 0.0
    assert training_recipe(decayed, Job("all", 1)).train.weight_decay == 0.1
    with pytest.raises(MergeError, match="sequence_parallel"):
        training_recipe(changed_train(recipe, sequence_parallel=2), Job("distilled", 1))
    with pytest.raises(MergeError, match="compile"):
        training_recipe(changed_train(recipe, compile=True), Job("routers", 1))


def test_a_training_that_was_stopped_goes_on_and_another_one_starts_anew(
    merging: Callable[[], Merging], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def trainer(own: RunFolder, recipe: Recipe, members: list[Any], options: Any) -> None:
        folder = own.expert(members[0].name)
        calls.append((folder / "checkpoints").is_dir())
        assert options.module == "megaxelm.merge.worker"
        assert json.loads((own.path / training.JOB).read_text())["job"]["steps"] == members[0].steps
        assert (own.folder("index") / "manifest.json").is_file() and (own.expert("start") / "export" / "config.json").is_file()
        assert not own.folder("index").readlink().is_absolute(), "the run may be moved"
        (folder / "checkpoints").mkdir(exist_ok=True)
        if len(calls) % 2:
            raise Preempted("stopped")
        shutil.copytree(own.expert("start") / "export", folder / "export")
        (folder / MARKER).write_text(json.dumps({"settings": {}, "inputs": {}, "sources": {}, "fingerprint": "", "weights": ""}))

    monkeypatch.setattr(training, "train_members", trainer)
    first = MergeOptions("distilled", steps=4)
    with pytest.raises(Preempted):
        merging().make(first)
    folder = merging().make(first)
    assert calls == [False, True] and (folder / "merge.json").is_file()
    assert json.loads((folder / "merge.json").read_text())["facts"]["training_tokens"] == 4 * 8 * 32
    assert not (run.path / "merged" / ".training" / "distilled").exists()
    made = merging()
    made.make(first)
    assert len(calls) == 2 and "fresh" in made.said[-1]  # type: ignore[attr-defined]

    with pytest.raises(Preempted):
        merging().make(MergeOptions("distilled", steps=5))
    merging().make(MergeOptions("distilled", steps=6))
    assert calls == [False, True, False, False], "of other steps: nothing of it is kept"


def test_a_student_may_start_from_a_dense_rung_alone(merging: Callable[[], Merging], monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Path] = []

    def trainer(*arguments: Any) -> Path:
        starts.append(arguments[5])
        return arguments[5]

    monkeypatch.setattr("megaxelm.merge.make.train_rung", trainer)
    made = merging()
    made.make(MergeOptions("moe", **SMALL))  # type: ignore[arg-type]
    made.make(MergeOptions("distilled", steps=2))
    made.make(MergeOptions("distilled", steps=2, start="seed"))
    made.make(MergeOptions("distilled", steps=2, start="average-uniform"))
    assert [start.name for start in starts] == ["average-uniform", "export", "average-uniform"]
    with pytest.raises(MergeError, match="--start moe: choose average, seed, dense, or a rung that is a dense model: average-uniform"):
        made.make(MergeOptions("distilled", steps=2, start="moe"))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "devices"), [("zero1", 1), ("zero3", 2)])
def test_routers_are_trained_and_nothing_else(merging: Callable[[], Merging], run: RunFolder, config: str, devices: int) -> None:
    made = merging()
    made.training = changed_train(made.training, deepspeed_config=config, num_devices=devices, lr=0.01)
    folder = made.make(MergeOptions("moe", router_steps=4, **SMALL))  # type: ignore[arg-type]
    assert folder.name == "moe-trained"
    before, after = open_pretrained(run.path / "merged" / "moe"), open_pretrained(folder)
    for name, _ in load_pretrained(folder).named_parameters():
        assert torch.equal(before.weight(name), after.weight(name)) == (not name.endswith("router.weight")), name
    lines = read_metrics(folder / "training.jsonl")
    assert lines[-1]["step"] == 4 and lines[-1]["loss"] > 0
    record = json.loads((folder / "merge.json").read_text())
    assert record["kind"] == "moe trained" and record["facts"]["start"] == "merged/moe"
    assert sorted(path.name for path in folder.parent.iterdir() if path.name != ".training") == ["moe", "moe-trained"]
    everything = made.make(MergeOptions("moe", router_steps=2, train="all", name="moe-all", **SMALL))  # type: ignore[arg-type]
    trained = open_pretrained(everything)
    assert not torch.equal(trained.weight("layers.0.mlp.experts.1.up.weight"), before.weight("layers.0.mlp.experts.1.up.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1", "zero3"])
def test_distillation_lowers_the_divergence_from_the_mixture(merging: Callable[[], Merging], config: str) -> None:
    made = merging()
    made.training = changed_train(made.training, deepspeed_config=config, lr=3e-3)
    folder = made.make(MergeOptions("distilled", steps=10, router="posterior", start="seed"))
    losses = [line["loss"] for line in read_metrics(folder / "training.jsonl")]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
