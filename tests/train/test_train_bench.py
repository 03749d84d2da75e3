"""The sweep of `megaxelm bench train`: which cases there are, what a failure becomes, and a real one."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_run import run_module

from megaxelm.errors import TokenizerError, TrainError
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.train.bench import Case, Row, _reason, cases, recommend, table
from megaxelm.train.bench_worker import RandomWindows
from megaxelm.train.shape import model_shape

TREE = {
    "name": "tiny",
    "corpus": {"train": "x"},
    "clusters": {"k": 2},
    "tokenizer": {"vocab_size": 512},
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64},
    "train": {"sequence_length": 32, "batch_sequences": 12, "micro_batch_size": 4, "precision": "auto", "num_devices": 2},
}


def recipe() -> Recipe:
    return parse_recipe(TREE)


def test_cases_that_come_to_the_same_are_measured_once() -> None:
    found = cases(recipe(), ["zero1"], [2, 4, 5], ["none", "3"])
    assert found == [Case("zero1", 2, "none"), Case("zero1", 2, "3"), Case("zero1", 3, "none"), Case("zero1", 3, "3")]


def test_a_configuration_that_needs_recomputation_is_not_measured_without() -> None:
    assert cases(recipe(), ["zero1", "long-context"], [1], ["none", "full"]) == [
        Case("zero1", 1, "none"),
        Case("zero1", 1, "full"),
        Case("long-context", 1, "full"),
    ]
    with pytest.raises(TrainError, match="--checkpointing has none: add full"):
        cases(recipe(), ["long-context"], [1], ["none"])


@pytest.mark.parametrize(
    ("configs", "sizes", "checkpointing", "words"),
    [
        (["zero7"], [1], ["none"], "no such file, and not one of"),
        (["zero1"], [0], ["none"], "--micro-batches: give whole numbers of at least 1"),
        (["zero1"], [1], ["half"], "--checkpointing half: give none, full, or a number"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(configs: list[str], sizes: list[int], checkpointing: list[str], words: str) -> None:
    with pytest.raises(TrainError, match=words):
        cases(recipe(), configs, sizes, checkpointing)


@pytest.mark.parametrize(
    ("code", "log", "outcome"),
    [
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "out of memory"),
        (-9, "", "out of memory"),
        (2, "started\nerror: train.attention = varlen: needs CUDA", "failed (exit code 2): train.attention = varlen: needs CUDA"),
        (0, "", "failed (exit code 0): it said nothing"),
    ],
)
def test_why_a_case_has_no_result(code: int, log: str, outcome: str) -> None:
    assert _reason(code, log) == outcome


def test_the_fastest_is_recommended_and_of_equals_the_one_with_less_memory() -> None:
    rows = [
        Row(Case("zero1", 1, "none"), "ok", 100.0, None, 1.0, 50),
        Row(Case("zero2", 1, "none"), "ok", 99.0, 0.5, 1.0, 40),
        Row(Case("zero3", 1, "none"), "ok", 90.0, None, 1.0, 10),
        Row(Case("zero0", 1, "none"), "out of memory"),
    ]
    best = recommend(rows)
    assert best is not None and best.case.config == "zero2"
    assert recommend(rows[3:]) is None
    lines = table(rows).splitlines()
    assert "out of memory" in lines[4] and "50.0%" in lines[2] and "n/a" in lines[1]


def test_random_windows_are_the_same_for_a_sample_whoever_reads_it() -> None:
    windows = RandomWindows(100, 8)
    whole, parts = windows.read(0, 4).tokens, [windows.read(number, 1).tokens[0] for number in range(4)]
    assert whole.shape == (4, 9) and (whole == parts).all() and whole.max() < 100


def test_the_shape_of_a_seed_or_of_the_model_section(tmp_path: Path) -> None:
    assert model_shape(recipe()).vocab_size == 512 and model_shape(recipe(), 600).vocab_size == 600
    config = {"model_type": "llama", "vocab_size": 77, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config |= {"intermediate_size": 24, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = parse_recipe(TREE | {"seed": {"load": str(tmp_path)}, "tokenizer": {"load": str(tmp_path)}})
    assert (model_shape(loaded).vocab_size, model_shape(loaded).num_layers) == (77, 3)


def test_the_pieces_of_a_loaded_tokenizer_are_counted_with_the_added_ones(tmp_path: Path) -> None:
    content = {"model": {"vocab": [["a", 0.0]] * 40}, "added_tokens": [{"id": 41, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = parse_recipe(TREE | {"tokenizer": {"load": str(tmp_path)}})
    assert model_shape(loaded).vocab_size == 42
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="give --vocab-size"):
        model_shape(loaded)


@pytest.mark.slow
def test_a_sweep_measures_and_an_exhausted_memory_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(TREE))
    arguments = ["--configs", "zero0,zero1", "--micro-batches", "2", "--checkpointing", "none", "--steps", "1"]
    # An embedding of 32 TB.
    huge = ["--set", "train.num_devices=1", "--set", "tokenizer.vocab_size=2000000", "--set", "model.hidden_size=4000000"]
    done = run_module("megaxelm.cli", "bench", "train", str(file), *arguments[2:], "--configs", "zero0", *huge)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "out of memory" in done.stdout and "no combination gave a result" in done.stderr

    output = tmp_path / "bench"
    done = run_module("megaxelm.cli", "bench", "train", str(file), *arguments, "--set", "train.num_devices=1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "bench.json").read_text())
    assert [row["case"]["config"] for row in found["rows"]] == ["zero0", "zero1"]
    assert all(row["outcome"] == "ok" and row["tokens_per_second"] > 0 and row["peak_memory"] > 1e8 for row in found["rows"])
    assert f"deepspeed_config: {found['recommended']['config']}" in done.stdout
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
