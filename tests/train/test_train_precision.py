"""`train.precision = auto`: what the device computes in, told and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import run_module

from megaxelm.errors import TrainError
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.train.ds_config import check_ds_config, fill_ds_config, find_ds_config
from megaxelm.train.members import plan_members
from megaxelm.train.precision import choose_precision, on_device, precision_notes

ON_CPU = "_is_mkldnn_bf16_supported"


def recipe_in(precision: str) -> Recipe:
    train = {"precision": precision, "batch_sequences": 8}
    return parse_recipe({"name": "r", "corpus": {"train": "x"}, "clusters": {"k": 2}, "train": train})


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_processor_multiplies_it(has: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, ON_CPU, lambda: has)
    assert choose_precision("auto", cuda=False) == expected
    assert on_device(recipe_in("auto"), cuda=False).train.precision == expected
    (note,) = precision_notes(recipe_in("auto"), cuda=False)
    assert note == f"train.precision = auto: {expected}, since this CPU has {'' if has else 'no '}bfloat16 arithmetic"
    slow = precision_notes(recipe_in("bf16"), cuda=False)
    assert slow == [] if has else "emulates it, many times slower than fp32" in slow[0]
    assert precision_notes(recipe_in("fp32"), cuda=False) == []


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_asks_the_gpu(has: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, ON_CPU, lambda: not has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    assert choose_precision("auto", cuda=True) == expected and choose_precision("fp16", cuda=True) == "fp16"
    if not has:
        with pytest.raises(TrainError, match="train.precision = bf16: Tesla V100 has no bfloat16 arithmetic; choose fp16 or fp32"):
            choose_precision("bf16", cuda=True)


def test_a_gpu_that_is_elsewhere_is_taken_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, ON_CPU, lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision("auto", cuda=True) == choose_precision("bf16", cuda=True) == "bf16"


def test_the_engine_gets_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    path, train = find_ds_config("zero1"), recipe_in("auto").train
    assert check_ds_config(path, train)["bf16"] == {"enabled": "auto"}, "no device is known yet"
    member = plan_members(recipe_in("auto"), ["a", "b"])["dense"]
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, ON_CPU, lambda has=has: has)
        config = fill_ds_config(path, train, member, 1, cuda=False)
        assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (has, False)


def test_what_was_chosen_is_told_and_kept_with_the_model(indexed_run: Path) -> None:
    chosen = choose_precision("auto", cuda=False)
    settings = ("train.precision=auto", "seed.steps=2", "train.steps=2")
    done = run_module("megaxelm.train", str(indexed_run), "--expert", "seed", *(part for item in settings for part in ("--set", item)))
    assert done.returncode == 0, done.stderr
    assert f"train.precision = auto: {chosen}, since this CPU" in done.stdout
    assert json.loads((indexed_run / "experts" / "seed" / "choices.json").read_text())["precision"] == chosen
    (saved,) = (indexed_run / "experts" / "seed" / "checkpoints").glob("*/complete.json")
    assert json.loads(saved.read_text())["layout"]["precision"] == chosen
