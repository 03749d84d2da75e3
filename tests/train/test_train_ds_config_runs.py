"""Every configuration that comes with the project really trains on a CPU, or says in words why not."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import run_module

TREE = {
    "name": "tiny",
    "corpus": {"train": "x"},
    "clusters": {"k": 2},
    "tokenizer": {"vocab_size": 512},
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64},
    "train": {"sequence_length": 32, "batch_sequences": 4, "micro_batch_size": 2, "activation_checkpointing": "full"},
}


def start(folder: Path, name: str, precision: str) -> tuple[dict | None, str, int]:
    """Result, what was said, and the exit code of two steps. The first offload on a machine compiles DeepSpeed's CPU Adam, and may not
    be cut short: the lock of the compilation would stay, and the next start wait for it."""
    file, output = folder / "recipe.yaml", folder / "result.json"
    file.write_text(yaml.safe_dump(TREE))
    arguments = ["--steps", "1", "--output", str(output), "--set", f"train.deepspeed_config={name}"]
    done = run_module("megaxelm.train.bench_worker", str(file), *arguments, "--set", f"train.precision={precision}", timeout=1200)
    return json.loads(output.read_text()) if output.exists() else None, done.stdout + done.stderr, done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero2-offload", "zero3-offload", "long-context"])
def test_a_configuration_trains(tmp_path: Path, name: str) -> None:
    result, said, code = start(tmp_path, name, "bf16")
    assert result is not None and code == 0, said[-3000:]
    assert result["loss"] == result["loss"] and result["loss"] > 0, "the loss is a number"


def test_fp16_trains_where_the_processor_has_it_and_is_refused_in_words_elsewhere(tmp_path: Path) -> None:
    result, said, code = start(tmp_path, "fp16", "fp16")
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        assert (result is not None and code == 0) or "train.precision" in said, said[-3000:]
    else:
        assert code == 2 and "Traceback" not in said and "train.precision = fp16: this CPU has no half-precision arithmetic" in said
